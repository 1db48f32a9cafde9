"""``config.json``: what is honoured comes back, what is not is refused by name."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_kernels import LinearScaling, Llama3Scaling, YarnScaling
from dovetail_models import ConfigError, LlamaConfig, MistralConfig, config_from_hf, config_to_hf

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_defaults_are_those_of_transformers() -> None:
    """Fields that older checkpoints leave out."""
    expected = LlamaConfig(vocab_size=100, features=32, hidden=64, layers=2, heads=4, norm_eps=1e-6)
    assert config_from_hf(BASE) == expected
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "pretraining_tp"))
    assert config_from_hf(BASE | nulls) == expected


def test_every_field_arrives() -> None:
    """A field that is dropped changes the numbers of somebody's checkpoint."""
    options = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 99,
        "rms_norm_eps": 1,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "initializer_range": 0.5,
        "rope_theta": 500,
    }
    assert config_from_hf(BASE | options) == LlamaConfig(
        vocab_size=100, features=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, max_position=99,
        norm_eps=1.0, tied=True, attention_bias=True, mlp_bias=True, init_std=0.5, rope_theta=500.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 500000.0}, 500000.0, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_theta": 9.0, "rope_parameters": {"rope_type": "default"}}, 9.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, LinearScaling(2.0)),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}, 10000.0, LinearScaling(2.0)),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "rope_theta": 5.0},
            5.0,
            Llama3Scaling(8.0, 1.0, 4.0, 64),
        ),
        ({"rope_parameters": LLAMA3, "max_position_embeddings": 77}, 10000.0, Llama3Scaling(8.0, 1.0, 4.0, 77)),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False}},
            10000.0,
            YarnScaling(4.0, 2048, beta_fast=16.0, truncate=False),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}},
            10000.0,
            YarnScaling(4.0, 512),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5, "beta_slow": None}},
            10000.0,
            YarnScaling(2.0, 2048, attention_factor=1.5),
        ),
        (
            {
                "rope_theta": 8.0,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 8.0},
            },
            8.0,
            LinearScaling(2.0),
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, 10000.0, None),
    ],
)
def test_rope(fields: dict[str, Any], theta: float, scaling: Any) -> None:
    """The styles of transformers 4 and 5 and the defaults of each kind."""
    config = config_from_hf(BASE | fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


positive = st.floats(0.5, 64)
scalings = st.one_of(
    st.none(),
    st.builds(LinearScaling, positive),
    st.builds(Llama3Scaling, positive, st.floats(0.5, 2), st.floats(3, 8), st.integers(1, 9999)),
    st.builds(
        YarnScaling,
        positive,
        st.integers(1, 9999),
        beta_fast=st.floats(9, 64),
        beta_slow=st.floats(0.5, 4),
        attention_factor=st.none() | positive,
        truncate=st.booleans(),
    ),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    config=st.builds(
        LlamaConfig,
        vocab_size=st.integers(1, 999),
        features=st.sampled_from([8, 16]),
        hidden=st.integers(1, 99),
        layers=st.integers(1, 9),
        heads=st.just(4),
        kv_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.sampled_from([2, 4, 6]),
        rope_theta=st.floats(2, 1e7),
        rope_scaling=scalings,
        max_position=st.integers(1, 9999),
        norm_eps=st.floats(0, 1),
        tied=st.booleans(),
        attention_bias=st.booleans(),
        mlp_bias=st.booleans(),
        init_std=st.floats(0, 1),
    )
)
def test_there_and_back(config: LlamaConfig) -> None:
    """Any configuration survives being written and read."""
    assert config_from_hf(config_to_hf(config, dtype="float32", token_ids={"eos_token_id": [1, 2]})) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPTJForCausalLM"]}, r"architectures=\['GPTJForCausalLM'\]; expected"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'"),
        ({"model_type": "mistral"}, "model_type='mistral'; expected 'llama'"),
        ({"architectures": None, "model_type": None}, "neither"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2; only 1"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"sliding_window": 128}, r"unknown fields \['sliding_window'\]"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": "100"}, "vocab_size='100'; expected an int"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"hidden_size": 32.0}, "hidden_size=32.0; expected an int"),
        ({"num_key_value_heads": 3}, "kv_heads=3"),
        ({"head_dim": "8"}, "head_dim='8'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small'; expected a float"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": -1.0}, "norm_eps=-1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'; expected a bool"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"rope_theta": -1.0}, "theta=-1.0"),
        ({"rope_scaling": 3}, "rope_scaling=3; expected an object"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic'; supported are 'default'",
        ),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "rope type"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, r"lacks \['factor'\]"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor to be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, r"\['mscale'\], which are not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor above low_freq_factor"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"lacks \['factor'\]"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate=1; expected a bool"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "differ",
        ),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    """A field that this model cannot honour must not be dropped in silence."""
    with pytest.raises(ConfigError, match=message):
        config_from_hf(BASE | change)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_missing_sizes(name: str) -> None:
    """Guessing a size would end in a confusing shape error."""
    with pytest.raises(ConfigError, match=rf"missing fields \['{name}'\]"):
        config_from_hf({key: value for key, value in BASE.items() if key != name})


def test_refused_on_the_way_out() -> None:
    """A directory that transformers would refuse or misread is not written."""
    sizes = {"vocab_size": 8, "features": 9, "hidden": 8, "layers": 1, "heads": 2, "head_dim": 4}
    config = LlamaConfig(**sizes)
    with pytest.raises(ConfigError, match="features=9 is no multiple of heads=2"):
        config_to_hf(config, dtype="float32")
    assert config_to_hf(MistralConfig(**sizes), dtype="float32")["head_dim"] == 4
    with pytest.raises(ConfigError, match=r"\['hidden_size'\]; expected names that end with '_token_id'"):
        config_to_hf(dataclasses.replace(config, features=8), dtype="float32", token_ids={"hidden_size": 1})
