"""What config.json means for each family: there and back, what is absent, what is refused."""

from typing import Any

import pytest
from model_toys import LATENT, MODELS, NEXT, RECURRENT, SHARED, SIZES

from dovetail_kernels import LinearScaling, LongRopeScaling, YarnScaling
from dovetail_models import (
    ConfigError,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3Config,
    Glm4MoeConfig,
    Gpt2Config,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    config_from_hf,
    config_to_hf,
)

FULL, WINDOW, LINEAR = "full_attention", "sliding_attention", {"rope_type": "linear", "factor": 2.0}
GLM = {"head_dim": 8}
SU = {"type": "su", "short_factor": [1], "long_factor": [2.0]}


@pytest.mark.parametrize(
    "config",
    [
        *(config for _, config in MODELS.values()),
        Gemma3Config(**SIZES, head_dim=6),
        MistralConfig(**SIZES),
        Gpt2Config(**RECURRENT, heads=2, hidden=12, scaled=False, tied=False),
        Olmo3Config(**SIZES),
        Phi3Config(**SIZES),
        Qwen2Config(**SIZES, windows=(5, None)),
        Qwen3Config(**SIZES, head_dim=2),
        Qwen3MoeConfig(**SIZES, expert_hidden=6, experts=4, top_k=4, dense_layers=(1,), renormalize=True),
        DeepseekV2Config(**LATENT, query_rank=3, rope_scaling=YarnScaling(4.0, 16, mscale=0.7, mscale_all_dim=0.8)),
        DeepseekV3Config(**LATENT, query_rank=None, expert_groups=1, kept_groups=1, renormalize=False),
        Glm4MoeConfig(**SIZES, **SHARED, rotary_fraction=1.0, renormalize=False, balanced=True, tied=True),
        Qwen3NextConfig(
            **SIZES | {"layers": 1}, **NEXT, head_dim=16, linear=(False,), sparse_step=2, dense_layers=(0,)
        ),
    ],
    ids=str,
)
def test_there_and_back(config: Any) -> None:
    """What is written to config.json is what is read from it."""
    assert config_from_hf(config_to_hf(config, dtype="float32")) == config


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        ("mistral", {}, {"window": 4096}),
        ("mistral", {"sliding_window": None}, {"window": None}),
        ("qwen2", {"sliding_window": 5}, {"windows": None}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, {"windows": (None, 4096)}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, {"windows": None}),
        ("qwen3", {}, {"head_dim": 128, "windows": None}),
        ("gemma2", {}, {"head_dim": 256, "windows": (4096, None), "attention_softcap": 50.0, "final_softcap": 30.0}),
        ("gemma2", {"final_logit_softcapping": None, "sliding_window": None}, {"final_softcap": None, "windows": None}),
        ("gemma3_text", {}, {"head_dim": 256, "kv_heads": 4, "windows": (4096,) * 2, "final_softcap": None}),
        ("gemma3_text", {}, {"rope_theta": 1e6, "local_theta": 1e4, "rope_scaling": None}),
        ("gemma3_text", {"rope_local_base_freq": 9, "rope_theta": 7.0}, {"rope_theta": 7.0, "local_theta": 9.0}),
        ("gemma3_text", {"rope_parameters": {FULL: {"rope_theta": 5.0}}}, {"rope_theta": 5.0, "local_theta": 1e4}),
        ("gemma3_text", {"rope_parameters": {WINDOW: {"rope_theta": 5.0}}}, {"rope_theta": 1e6, "local_theta": 5.0}),
        ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 5}, {"windows": (5, None)}),
        ("gemma3_text", {"layer_types": [FULL] * 2, "sliding_window": None}, {"windows": None}),
        ("olmo3", {}, {"windows": (4096,) * 2, "rope_theta": 5e5, "local_theta": 5e5, "norm_eps": 1e-5}),
        ("olmo3", {"rope_theta": 7.0}, {"rope_theta": 7.0, "local_theta": 7.0}),
        (
            "olmo3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "layer_types": [FULL, WINDOW]},
            {"rope_scaling": LinearScaling(2.0), "windows": (None, 4096)},
        ),
        ("phi3", {}, {"window": None, "rotary_fraction": 1.0, "max_position": 4096, "rope_scaling": None}),
        ("phi3", {"partial_rotary_factor": 0.5, "head_dim": 8}, {"rotary_fraction": 0.5, "head_dim": 8}),
        (
            "phi3",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            {"rotary_fraction": 1.0},
        ),
        (
            "phi3",
            {"rope_scaling": SU, "max_position_embeddings": 8192},
            {"rope_scaling": LongRopeScaling((1.0,), (2.0,), 4096, factor=2.0)},
        ),
        ("mixtral", {}, {"experts": 8, "top_k": 2, "window": None, "rope_theta": 1e6, "balanced": False}),
        ("qwen3_moe", {}, {"experts": 128, "top_k": 8, "renormalize": False, "expert_hidden": 768, "kv_heads": 4}),
        ("qwen3_moe", {"num_local_experts": 9, "use_sliding_window": True}, {"experts": 9, "window": 4096}),
        ("deepseek_v2", {"num_experts_per_tok": 6}, {"query_rank": 1536, "expert_groups": None, "shared_experts": 2}),
        ("deepseek_v2", {"num_experts_per_tok": 6, "q_lora_rank": None}, {"query_rank": None, "first_dense": 0}),
        ("deepseek_v3", {}, {"experts": 256, "top_k": 8, "expert_groups": 8, "kept_groups": 4, "routed_scale": 2.5}),
        ("deepseek_v3", {}, {"renormalize": True, "ahead": 1, "first_dense": 3, "interleaved": True, "rope_dim": 64}),
        (
            "glm4_moe",
            {"head_dim": 8},
            {"experts": 128, "top_k": 8, "expert_groups": 1, "kept_groups": 1, "routed_scale": 1.0},
        ),
        (
            "glm4_moe",
            {"head_dim": 8},
            {"rotary_fraction": 0.5, "first_dense": 1, "ahead": 1, "kv_heads": 8, "norm_eps": 1e-5},
        ),
        ("glm4_moe", GLM | {"num_mtp_layers": 2, "num_local_experts": 9}, {"ahead": 2, "experts": 9}),
        ("gpt_oss", {}, {"experts": 128, "top_k": 4, "windows": (128, None), "attention_bias": True, "head_dim": 64}),
        ("gpt_oss", {}, {"rope_scaling": YarnScaling(32.0, 4096, truncate=False), "rope_theta": 150000.0}),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default"}}, {"rope_scaling": None, "rope_theta": 150000.0}),
        ("olmo2", {}, {"norm_eps": 1e-5, "rope_theta": 10000.0}),
        (
            "qwen3_next",
            {},
            {"rotary_fraction": 0.25, "linear": (True, True), "top_k": 10, "experts": 512, "head_dim": 256},
        ),
        (
            "qwen3_next",
            {"full_attention_interval": 2},
            {"linear": (True, False), "renormalize": True, "value_heads": 32},
        ),
        ("qwen3_next", {"partial_rotary_factor": 0.5, "rope_theta": 7.0}, {"rotary_fraction": 0.5, "rope_theta": 7.0}),
        (
            "qwen3_next",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 9.0}},
            {"rotary_fraction": 1.0, "rope_theta": 9.0},
        ),
        ("smollm3", {}, {"rotated": (True, True), "rope_theta": 2000000.0, "tied": True}),
        ("smollm3", {"no_rope_layer_interval": 2}, {"rotated": (True, False)}),
    ],
)
def test_what_is_absent_is_as_in_transformers(config: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """A default that differs from theirs changes the numbers of a checkpoint that does not write it."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(names, (24, 64, 12, 2, 32), strict=True))
    got = config_from_hf({"model_type": config, **sizes, **changes})
    assert {name: getattr(got, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types=.*expected a list of 2"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "without use_sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "windows="),
        ("qwen3", {"attention_bias": 1}, "attention_bias=1; expected a bool"),
        ("mistral", {"sliding_window": 0}, "window=0; expected at least 1"),
        ("mistral", {"sliding_window": "5"}, "sliding_window='5'"),
        ("qwen3_next", {"layer_types": ["full_attention"]}, "layer_types=.*expected a list of 2"),
        ("qwen3_next", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval=0; expected at least 1"),
        ("qwen3_next", {"partial_rotary_factor": 0.0}, "partial_rotary_factor=0.0; expected above 0"),
        ("qwen3_next", {"linear_num_value_heads": 24}, "value_heads=24; expected a multiple of key_heads=16"),
        ("qwen3_next", {"linear_key_head_dim": 0}, "key_dim=0; expected at least 1"),
        ("qwen3_next", {"mlp_only_layers": "0"}, "mlp_only_layers='0'; expected a list"),
        ("qwen3_next", {"head_dim": 12, "partial_rotary_factor": 0.25}, "dim.*3"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers=.*for each of 2 layers"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_softcap=0.0"),
        ("gemma2", {"use_bidirectional_attention": True}, "only False is supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "only None is supported"),
        ("gemma3_text", {"final_logit_softcapping": 0.0}, "final_softcap=0.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "only False is supported"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, f"expected an object with '{FULL}'"),
        ("gemma3_text", {"rope_parameters": {WINDOW: LINEAR}}, "support the type 'default' alone"),
        ("gemma3_text", {"rope_parameters": {WINDOW: 3}}, "rope_parameters=3; expected an object"),
        ("gemma3_text", {"rope_local_base_freq": 0.5}, "theta=0.5; expected more than 1"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window=None; expected an int"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern=0; expected at least 1"),
        ("olmo3", {"rope_scaling": LINEAR, "rope_parameters": {FULL: {"rope_type": "default"}}}, "differ"),
        ("olmo3", {"sliding_window": 0}, "windows="),
        ("phi3", {"rope_scaling": LINEAR}, "rope type 'linear'; supported are 'default', 'longrope'"),
        ("phi3", {"rope_scaling": {**SU, "short_factor": 1.0}}, "short_factor=1.0; expected a list of numbers"),
        ("phi3", {"rope_scaling": {**SU, "long_factor": [1.0, "2"]}}, "long_factor='2'; expected a float"),
        ("phi3", {"rope_scaling": {**SU, "long_factor": [1.0, 2.0]}}, "as many short as long factors"),
        ("phi3", {"rope_scaling": {**SU, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}}, "3 factors; expected"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5; expected above 0 and at most 1"),
        (
            "phi3",
            {
                "rope_scaling": {**SU, "partial_rotary_factor": 0.5},
                "rope_parameters": {**SU, "partial_rotary_factor": 1.0},
            },
            "partial_rotary_factor is different in two places",
        ),
        ("phi3", {"sliding_window": 0}, "window=0; expected at least 1"),
        ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop=0.1; only 0.0"),
        ("llama", {"rope_scaling": SU}, "rope type 'su'; supported are"),
        ("mixtral", {"num_local_experts": 1}, "top_k=2; expected between 1 and the 1 experts"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1; only 0.0"),
        ("mixtral", {"router_aux_loss_coef": -1.0}, "balance_coef=-1.0"),
        ("mixtral", {"sliding_window": 0}, "window=0; expected at least 1"),
        (
            "qwen3_moe",
            {"num_experts": 8, "num_local_experts": 9},
            "num_local_experts=9, num_experts=8; expected one value",
        ),
        ("qwen3_moe", {"mlp_only_layers": [0.5]}, r"mlp_only_layers=\[0.5\]; expected a list of indices"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "sparse_step=0"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 0}, "window=0"),
        ("deepseek_v2", {"num_experts_per_tok": 2}, "num_key_value_heads=2; expected 4"),
        ("gpt_oss", {"experts_per_token": 2}, "experts_per_token=2, num_experts_per_tok=4; expected one number"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "limit=0.0"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4.*; quantized checkpoints are not read"),
        (
            "glm4_moe",
            {"num_mtp_layers": 2, "num_nextn_predict_layers": 1},
            "num_mtp_layers=2, num_nextn_predict_layers=1",
        ),
        ("glm4_moe", GLM | {"n_group": 3}, "expert_groups=3, kept_groups=1; expected a divisor of 128"),
        (
            "glm4_moe",
            GLM | {"n_group": 128, "topk_group": 9},
            "expert_groups=128; expected groups of at least 2",
        ),
        ("glm4_moe", GLM | {"n_shared_experts": 0}, "shared_experts=0; expected at least 1"),
        ("glm4_moe", {"partial_rotary_factor": 2.0}, "partial_rotary_factor=2.0; expected above 0 and at most 1"),
        ("glm4_moe", {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ("glm4_moe", {"scoring_func": "softmax"}, "unknown fields.*scoring_func"),
        ("gptj", {}, "model_type='gptj'; expected one of"),
    ],
)
def test_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    """A field that the model cannot honour is not dropped in silence."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(names, (24, 8, 12, 2, 4), strict=True))
    with pytest.raises(ConfigError, match=message):
        config_from_hf({"model_type": model_type, "num_key_value_heads": 2, **sizes, **changes})


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (2, {"num_experts_per_tok": None}, "num_experts_per_tok=None; expected an int"),
        (2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'; expected 'greedy' or 'group_limited_greedy'"),
        (2, {"topk_method": "group_limited_greedy"}, "n_group=None; expected an int"),
        (2, {"norm_topk_prob": True}, "norm_topk_prob=True; only False"),
        (2, {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'; only 'softmax'"),
        (2, {"kv_lora_rank": 0}, "latent_dim=0"),
        (2, {"qk_rope_head_dim": 3}, "dim=3"),
        (3, {"n_group": 3}, "expert_groups=3, kept_groups=4; expected a divisor of 256"),
        (3, {"n_group": 256, "topk_group": 9}, "expert_groups=256; expected groups of at least 2"),
        (3, {"num_experts_per_tok": 200}, "top_k=200; expected at most the experts of 4 groups"),
        (3, {"num_nextn_predict_layers": -1}, "ahead=-1"),
        (3, {"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoints are not read"),
    ],
)
def test_refused_of_deepseek(version: int, changes: dict[str, Any], message: str) -> None:
    """A way of routing that is another one there is not taken for ours."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = dict(zip(names, (24, 8, 12, 2, 4), strict=True)) | {"num_experts_per_tok": 6}
    with pytest.raises(ConfigError, match=message):
        config_from_hf({"model_type": f"deepseek_v{version}", **values, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"max_position": 1024, "hidden": None, "inner": 256, "scaled": True, "tied": True, "norm_eps": 1e-5}),
        ({"n_inner": 7, "n_positions": 9, "attn_pdrop": 0.1}, {"inner": 7, "max_position": 9}),
        ({"activation_function": "relu"}, "only 'gelu_new' is supported"),
        ({"add_cross_attention": True}, "only False is supported"),
        ({"n_inner": 0}, "hidden=0; expected at least 1"),
        ({"n_head": 5}, "features=64; expected a multiple of heads=5"),
        ({"hidden_size": 64}, "unknown fields"),
    ],
)
def test_gpt2_has_names_of_its_own(changes: dict[str, Any], expected: dict[str, Any] | str) -> None:
    """Its config.json says the same in other words."""
    values = {"model_type": "gpt2", "vocab_size": 24, "n_embd": 64, "n_layer": 2, "n_head": 2, **changes}
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            config_from_hf(values)
    else:
        got = config_from_hf(values)
        assert {name: getattr(got, name) for name in expected} == expected


def test_scalings_that_cannot_be_written() -> None:
    """Transformers refuses a Phi-3 with another scaling."""
    with pytest.raises(ConfigError, match="knows None and LongRopeScaling"):
        config_to_hf(Phi3Config(**SIZES, rope_scaling=LinearScaling(2.0)), dtype="float32")


def test_two_widths_cannot_be_written() -> None:
    """Transformers has one width for all layers of a model."""
    with pytest.raises(ConfigError, match="one width"):
        config_to_hf(Qwen2Config(**SIZES, windows=(3, 4)), dtype="float32")
    with pytest.raises(ValueError, match="expected one for each of 2 layers"):
        Qwen2Config(**SIZES, windows=(3,))
