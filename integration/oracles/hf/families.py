"""Random configurations and models of transformers, with weights that make logits and their margins wide."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["FAMILIES", "in_memory", "load_theirs", "random_config", "widened"]


EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def rope_of(rng: random.Random) -> dict[str, Any]:
    theta = rng.choice([1000.0, 10000.0, 500000.0])
    factor = rng.choice([1.5, 2.0, 8.0])
    original = rng.choice([16, 64])
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": factor},
        {
            **{"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original},
            **{"low_freq_factor": rng.choice([1.0, 2.0]), "high_freq_factor": rng.choice([4.0, 8.0])},
        },
        {
            **{"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original},
            **rng.choice([{}, {"attention_factor": 1.2}, {"truncate": False}, {"beta_fast": 16.0, "beta_slow": 2.0}]),
        },
    ]
    return {"rope_theta": theta, **rng.choice(kinds)}


def sizes(rng: random.Random) -> dict[str, Any]:
    """Draw what most decoders have."""
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    heads = kv_heads * group
    return {
        "vocab_size": rng.randint(20, 90),
        "hidden_size": heads * rng.choice([4, 8]),
        "intermediate_size": rng.randint(8, 50),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([None, 4, 10]),
        "max_position_embeddings": rng.choice([64, 256]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-2]),
        "tie_word_embeddings": rng.random() < 0.4,
        "attention_bias": rng.random() < 0.4,
        "mlp_bias": rng.random() < 0.4,
        "rope_parameters": rope_of(rng),
        "eos_token_id": rng.choice([None, 2, [2, 5]]),
        "pad_token_id": None,  # its embedding would get no gradient there
        "attn_implementation": "eager",
    }


def without(values: dict[str, Any], *names: str, head_dim: bool = True) -> dict[str, Any]:
    """Leave out fields that a configuration does not have; without `head_dim` the model reads one only if it is set."""
    lost = (*names, *(() if head_dim or values["head_dim"] else ("head_dim",)))
    return {name: value for name, value in values.items() if name not in lost}


def llama(rng: random.Random) -> Any:
    return transformers.LlamaConfig(**sizes(rng))


def mistral(rng: random.Random) -> Any:
    values = without(sizes(rng), "attention_bias", "mlp_bias")
    return transformers.MistralConfig(**values, sliding_window=rng.choice([None, 1, 5, 16]))


def windows(rng: random.Random, layers: int) -> dict[str, Any]:
    """Draw which layers of a Qwen see a window only."""
    if rng.random() < 0.4:
        return {"use_sliding_window": False}
    some = rng.choice([{"max_window_layers": rng.randint(0, layers)}, {}])
    kinds = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
    width = {"use_sliding_window": True, "sliding_window": rng.choice([1, 6, 20])}
    return {**width, **(some or {"layer_types": kinds})}


def qwen2(rng: random.Random) -> Any:
    values = without(sizes(rng), "attention_bias", "mlp_bias", head_dim=False)
    return transformers.Qwen2Config(**values, **windows(rng, values["num_hidden_layers"]))


def qwen3(rng: random.Random) -> Any:
    values = without(sizes(rng), "mlp_bias")
    values["head_dim"] = values["head_dim"] or 6
    return transformers.Qwen3Config(**values, **windows(rng, values["num_hidden_layers"]))


def olmo2(rng: random.Random) -> Any:
    return transformers.Olmo2Config(**without(sizes(rng), "mlp_bias", head_dim=False))


def olmo3(rng: random.Random) -> Any:
    values = without(sizes(rng), "mlp_bias", "rope_parameters", head_dim=False)
    types = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(values["num_hidden_layers"])]
    return transformers.Olmo3Config(
        **values, **rope_of_kinds(rng, None), layer_types=rng.choice([None, types]), sliding_window=rng.choice([1, 6])
    )


def phi3(rng: random.Random) -> Any:
    values = without(sizes(rng), "attention_bias", "mlp_bias", "head_dim", "rope_parameters")
    values["hidden_size"] = values["num_attention_heads"] * 8
    fraction = rng.choice([0.5, 1.0])
    count = int(8 * fraction) // 2
    scaling = {
        **{"rope_type": "longrope", "short_factor": [rng.uniform(1, 2) for _ in range(count)]},
        "long_factor": [rng.uniform(2, 8) for _ in range(count)],
    }
    rope = {"rope_type": "default"} if rng.random() < 0.3 else scaling
    return transformers.Phi3Config(
        **values,
        rope_parameters={"rope_theta": rng.choice([1000.0, 10000.0]), "partial_rotary_factor": fraction, **rope},
        original_max_position_embeddings=64,
        sliding_window=rng.choice([None, 1, 6]),
        bos_token_id=None,
    )


def gemma2(rng: random.Random) -> Any:
    values = without(sizes(rng), "mlp_bias")
    values["head_dim"] = values["head_dim"] or 6
    types = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(values["num_hidden_layers"])]
    return transformers.Gemma2Config(
        **values,
        layer_types=rng.choice([None, types]),
        sliding_window=rng.choice([1, 6, 20]),
        query_pre_attn_scalar=rng.choice([4, 9]),
        attn_logit_softcapping=rng.choice([None, 2.0, 50.0]),
        final_logit_softcapping=rng.choice([None, 1.5, 30.0]),
    )


def latent(rng: random.Random) -> dict[str, Any]:
    """Draw what models with latent attention have."""
    values = without(sizes(rng), "head_dim", "mlp_bias")
    values["num_key_value_heads"] = values["num_attention_heads"]
    if rng.random() < 0.5:
        warmth = rng.choice([{}, {"mscale": 0.7, "mscale_all_dim": 0.9}, {"mscale_all_dim": 1.0}])
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        values["rope_parameters"] = {"rope_theta": 10000.0, **yarn, **warmth}
    return values | {
        "q_lora_rank": rng.choice([None, 7]),
        "kv_lora_rank": rng.choice([6, 16]),
        "qk_nope_head_dim": rng.choice([4, 8]),
        "qk_rope_head_dim": rng.choice([2, 8]),
        "v_head_dim": rng.choice([4, 9]),
        "n_routed_experts": 8,
        "n_shared_experts": rng.choice([1, 2]),
        "num_experts_per_tok": rng.randint(1, 4),
        "n_group": rng.choice([2, 4]),
        "topk_group": rng.choice([1, 2]),
        "moe_intermediate_size": rng.randint(4, 12),
        "first_k_dense_replace": rng.choice([0, 0, 1]),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
    }


def deepseek_v2(rng: random.Random) -> Any:
    values = latent(rng)
    values["num_experts_per_tok"] = min(values["num_experts_per_tok"], 2)
    return transformers.DeepseekV2Config(
        **values, mlp_bias=rng.random() < 0.4, topk_method=rng.choice(["greedy", "group_limited_greedy"])
    )


def deepseek_v3(rng: random.Random) -> Any:
    values = latent(rng)
    values["num_experts_per_tok"] = min(values["num_experts_per_tok"], 2)
    interleaved = rng.random() < 0.7
    return transformers.DeepseekV3Config(**values, norm_topk_prob=rng.random() < 0.6, rope_interleave=interleaved)


def glm4_moe(rng: random.Random) -> Any:
    values = without(sizes(rng), "mlp_bias", head_dim=False)
    if "head_dim" in values:
        values |= {"head_dim": 8, "hidden_size": rng.choice([18, 25, 32])}
    share = rng.choice([{}, {"partial_rotary_factor": rng.choice([0.5, 1.0])}])
    return transformers.Glm4MoeConfig(
        **values | {"rope_parameters": values["rope_parameters"] | share},
        use_qk_norm=rng.random() < 0.5,
        n_routed_experts=rng.choice([4, 8]),
        n_shared_experts=rng.randint(1, 2),
        num_experts_per_tok=rng.randint(1, 2),
        moe_intermediate_size=rng.randint(4, 20),
        first_k_dense_replace=rng.choice([0, 1]),
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        norm_topk_prob=rng.random() < 0.6,
        **rng.choice([{}, {"n_group": 2, "topk_group": 1}, {"n_group": 2, "topk_group": 2}]),
    )


def rope_of_kinds(rng: random.Random, local: str | None) -> dict[str, Any]:
    """Draw rotary settings as transformers 5 writes them for each kind of layer, or as 4 did."""
    full, theta = rope_of(rng), rng.choice([1000.0, 20000.0])
    if local is not None and rng.random() < 0.4:
        return {"rope_theta": full.pop("rope_theta"), "rope_scaling": full, local: theta}
    small = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": small}}


def gemma3(rng: random.Random) -> Any:
    values = without(sizes(rng), "mlp_bias", "rope_parameters") | {"num_hidden_layers": rng.randint(1, 4)}
    values["head_dim"] = values["head_dim"] or 6
    return transformers.Gemma3TextConfig(
        **values,
        **rope_of_kinds(rng, "rope_local_base_freq"),
        sliding_window_pattern=rng.choice([2, 3, 6]),
        sliding_window=rng.choice([1, 6, 20]),
        query_pre_attn_scalar=rng.choice([4, 9]),
        final_logit_softcapping=rng.choice([None, 1.5, 30.0]),
    )


def gpt2(rng: random.Random) -> Any:
    heads = rng.choice([1, 2, 4])
    return transformers.GPT2Config(
        vocab_size=rng.randint(20, 90),
        n_embd=heads * rng.choice([4, 8]),
        n_layer=rng.randint(1, 3),
        n_head=heads,
        n_inner=rng.choice([None, 20]),
        n_positions=rng.choice([64, 100]),
        layer_norm_epsilon=rng.choice([1e-5, 1e-2]),
        tie_word_embeddings=rng.random() < 0.6,
        scale_attn_weights=rng.random() < 0.7,
        scale_attn_by_inverse_layer_idx=rng.random() < 0.4,
        bos_token_id=None,
        eos_token_id=rng.choice([None, 2, [2, 5]]),
        attn_implementation="eager",
    )


def gpt_oss(rng: random.Random) -> Any:
    values = without(sizes(rng), "mlp_bias")
    values["head_dim"] = values["head_dim"] or 6
    types = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(values["num_hidden_layers"])]
    return transformers.GptOssConfig(
        **values,
        layer_types=rng.choice([None, types]),
        sliding_window=rng.choice([1, 6, 20]),
        num_local_experts=rng.choice([3, 6]),
        num_experts_per_tok=rng.randint(1, 3),
        swiglu_alpha=rng.choice([1.702, 0.8]),
        swiglu_limit=rng.choice([7.0, 0.9]),
    )


def mamba2(rng: random.Random) -> Any:
    groups, share = rng.choice([1, 2, 3]), rng.choice([2, 4])
    return transformers.Mamba2Config(
        vocab_size=rng.randint(20, 90),
        hidden_size=groups * share * 8,
        num_hidden_layers=rng.randint(1, 3),
        num_heads=groups * share,
        head_dim=16,
        n_groups=groups,
        state_size=rng.choice([3, 16]),
        conv_kernel=rng.choice([2, 4]),
        use_bias=rng.random() < 0.4,
        use_conv_bias=rng.random() < 0.6,
        layer_norm_epsilon=rng.choice([1e-5, 1e-2]),
        time_step_limit=rng.choice([(0.0, float("inf")), (0.05, 0.8)]),
        tie_word_embeddings=rng.random() < 0.4,
        residual_in_fp32=rng.random() < 0.5,
        pad_token_id=None,
        eos_token_id=rng.choice([None, 2, [2, 5]]),
    )


def mixtral(rng: random.Random) -> Any:
    values = without(sizes(rng), "attention_bias", "mlp_bias")
    experts = rng.choice([2, 5, 8])
    return transformers.MixtralConfig(
        **values,
        sliding_window=rng.choice([None, 6]),
        num_local_experts=experts,
        num_experts_per_tok=rng.randint(1, min(experts, 3)),
    )


def qwen3_moe(rng: random.Random) -> Any:
    values = without(sizes(rng), "mlp_bias", head_dim=False)
    seen = rng.choice([{}, {"use_sliding_window": True, "sliding_window": 5}])
    return transformers.Qwen3MoeConfig(
        **values,
        **seen,
        num_experts=rng.choice([4, 7]),
        num_experts_per_tok=rng.randint(1, 4),
        moe_intermediate_size=rng.randint(4, 20),
        norm_topk_prob=rng.random() < 0.5,
        decoder_sparse_step=rng.choice([1, 1, 2]),
        mlp_only_layers=rng.choice([None, [0]]),
    )


def qwen3_next(rng: random.Random) -> Any:
    values = without(sizes(rng), "mlp_bias")
    layers = values["num_hidden_layers"] = rng.randint(2, 4)
    experts, key_heads = rng.choice([3, 6]), rng.choice([1, 2])
    kinds = [rng.choice(["linear_attention", "full_attention"]) for _ in range(layers - 1)]
    share = rng.choice([{}, {"partial_rotary_factor": rng.choice([0.5, 1.0])}])
    return transformers.Qwen3NextConfig(
        **values
        | {
            "hidden_size": values["num_attention_heads"] * 8,
            "head_dim": rng.choice([8, 16]),
            "rms_norm_eps": rng.choice([1e-4, 1e-2]),  # heads that recall nothing have norms of nothing but rounding
            "layer_types": [*kinds, "full_attention"],
            "rope_parameters": values["rope_parameters"] | share,
        },
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * rng.choice([1, 2]),
        linear_key_head_dim=rng.choice([4, 8]),
        linear_value_head_dim=rng.choice([8, 12]),
        linear_conv_kernel_dim=rng.choice([2, 4]),
        num_experts=experts,
        num_experts_per_tok=rng.randint(1, 3),
        moe_intermediate_size=rng.randint(4, 20),
        shared_expert_intermediate_size=rng.randint(4, 20),
        norm_topk_prob=rng.random() < 0.7,
        decoder_sparse_step=rng.choice([1, 1, 2]),
        mlp_only_layers=rng.choice([None, [0]]),
    )


def smollm3(rng: random.Random) -> Any:
    values = without(sizes(rng), head_dim=False) | {"num_hidden_layers": 4}
    marks = rng.choice([{}, {"no_rope_layer_interval": 2}, {"no_rope_layers": [0, 1, 1, 0]}])
    seen = rng.choice([{}, {"use_sliding_window": True, "sliding_window": 5}])
    return transformers.SmolLM3Config(**values, **marks, **seen)


FAMILIES: dict[str, Callable[[random.Random], Any]] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "glm4_moe": glm4_moe,
    "gpt2": gpt2,
    "gpt_oss": gpt_oss,
    "llama": llama,
    "mamba2": mamba2,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "smollm3": smollm3,
}


def random_config(seed: int, family: str = "llama") -> Any:
    return FAMILIES[family](random.Random(seed))


def widened(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER).float().eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name or name.endswith(("A_log", ".D")):
                less = lessened(config.model_type, name)
                parameter.uniform_(0.5 - less, 1.5 - less)
            elif name.endswith("bias") or parameter.ndim == 1:
                parameter.normal_(std=0.3)
            else:
                inputs = parameter.shape[-1 if "conv" in name else 1]
                parameter.normal_(std=1.0 if "embed" in name else 1.3 * inputs**-0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.normal_(std=0.3)
    return model


def lessened(family: str, name: str) -> float:
    """Return what a parameter is stored less of, as weights of norms, or smaller by."""
    if name.endswith("linear_attn.A_log"):
        return 2.0  # their sums of decays lose digits where these are strong
    return 1.0 if family.startswith(("gemma", "qwen3_next")) and "linear_attn" not in name else 0.0


def load_theirs(folder: Path) -> Any:
    return in_memory(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER).eval())


def in_memory(model: Any) -> Any:
    """Give a model copies of its tensors, which it leaves in the file otherwise.

    On some processors the last digit of PyTorch's products depends on where a matrix begins in memory.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
