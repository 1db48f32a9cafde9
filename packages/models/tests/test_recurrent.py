"""Recurrent layers: what mixers are promised of them, and the configurations of the families that have them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dovetail_kernels import DenseMixer
from dovetail_models import (
    ConfigError,
    Mamba2,
    Mamba2Config,
    Qwen3Next,
    Qwen3NextConfig,
    config_from_hf,
    config_to_hf,
    describe,
    from_pretrained,
    save_pretrained,
)
from dovetail_models.delta_net import GatedDeltaNet
from dovetail_protocols import Recurrence, RecurrentCache
from dovetail_protocols.testing import check_recurrence
from dovetail_weights import open_directory, write_directory

SMALL = Mamba2Config(
    vocab_size=24, features=8, layers=2, heads=4, head_dim=4, state_size=5, groups=2, conv_width=3, init_std=0.5
)
THEIRS = {"model_type": "mamba2", "vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def noisy(module: Any, seed: int = 0) -> Any:
    """Return a module whose parameters all matter."""
    definition, state = nnx.split(module)
    keys = iter(range(seed, seed + 100))
    return nnx.merge(definition, jax.tree.map(lambda x: x + 0.3 * draw(next(keys), *x.shape), state))


def test_state_space_recurrence() -> None:
    """A prompt that is cut, padded or packed, or a reply after it, differs from the whole sequence."""
    recurrence = noisy(Mamba2(SMALL, rngs=nnx.Rngs(0)).layers[0].attention).recurrence()
    assert isinstance(recurrence, Recurrence)
    assert recurrence.cache_spec() == RecurrentCache(
        (("conv_x", (2, 16)), ("conv_b", (2, 10)), ("conv_c", (2, 10)), ("scan", (4, 4, 5)))
    )
    check_recurrence(recurrence, [draw(i, 2, 9, size) for i, size in enumerate((16, 10, 10, 4))])


def test_delta_recurrence() -> None:
    """The same of Qwen3-Next's layers."""
    options = {"key_heads": 2, "value_heads": 4, "key_dim": 4, "value_dim": 3, "width": 3, "norm_eps": 1e-6}
    init = nnx.initializers.normal(0.5)
    net = GatedDeltaNet(8, **options, init=init, out_init=init, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert (jnp.exp(net.a_log.get_value()) < 16).all()
    recurrence = noisy(net).recurrence()
    assert isinstance(recurrence, Recurrence)
    assert recurrence.cache_spec() == RecurrentCache(
        (("conv_query", (2, 8)), ("conv_key", (2, 8)), ("conv_value", (2, 12)), ("rule", (4, 4, 3)))
    )
    check_recurrence(recurrence, [draw(i, 2, 9, size) for i, size in enumerate((8, 8, 12, 4, 4))])


def test_heads_for_predictions_of_later_tokens_are_left_out(tmp_path: Path) -> None:
    """Checkpoints hold a module that no forward uses; refusing it would refuse them all."""
    config = Qwen3NextConfig(
        **{
            "vocab_size": 11,
            "features": 8,
            "hidden": 4,
            "layers": 1,
            "heads": 2,
            "kv_heads": 1,
            "expert_hidden": 3,
            "experts": 2,
        },
        **{"top_k": 1, "shared_hidden": 3, "head_dim": 8, "linear": (False,)},
    )
    folder = save_pretrained(Qwen3Next(config, rngs=nnx.Rngs(0)), tmp_path / "model")
    held = open_directory(folder)
    tensors = {name: held.read(name) for name in held} | {"mtp.norm.weight": np.ones(8, np.float32)}
    write_directory(tmp_path / "more", tensors, extra_files={"config.json": (folder / "config.json").read_bytes()})
    assert from_pretrained(tmp_path / "more").config == config


def test_what_is_kept_does_not_grow() -> None:
    """An engine's memory is planned by this: states are float32 whatever the parameters are."""
    found = describe(SMALL, time=8, param_dtype=jnp.bfloat16)
    assert found.cache_bytes_per_token == 0
    assert found.cache_bytes_at_most == 2 * 4 * (2 * (16 + 10 + 10) + 4 * 4 * 5)


def test_initial_steps_and_rates() -> None:
    """Steps that begin too small or too large do not learn; rates are those of the paper."""
    config = dataclasses.replace(SMALL, features=64, heads=64, dt_init=(0.01, 0.5, 0.02))
    attention = Mamba2(config, rngs=nnx.Rngs(0)).layers[0].attention
    steps = jax.nn.softplus(attention.dt_bias.get_value())
    assert 0.0199 < steps.min() < 0.04
    assert 0.25 < steps.max() < 0.501
    np.testing.assert_allclose(jnp.exp(attention.a_log.get_value()), np.arange(1, 65), rtol=1e-5)
    width = config.conv_width
    taps = attention.conv_x.get_value()
    assert 0.9 * width**-0.5 < jnp.abs(taps).max() <= width**-0.5


def test_the_residual_stream_may_be_wider() -> None:
    """Sums of 16 bits lose what many layers add; products of 32 are slow."""
    tokens = jnp.arange(6, dtype=jnp.int32)
    seen = dict[bool, Any]()
    for wide in (True, False):
        config = dataclasses.replace(SMALL, residual_float32=wide)
        model = Mamba2(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        x = jnp.ones((6, 8), jnp.bfloat16)
        out, _, _ = model.layers[0](0, x, {}, DenseMixer.of(tokens[None]))
        assert out.dtype == (jnp.float32 if wide else jnp.bfloat16)
        seen[wide], _, _ = model.hidden(tokens, tokens, DenseMixer.of(tokens[None]))
        assert seen[wide].dtype == jnp.bfloat16
    assert (seen[True] != seen[False]).any()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_heads": 16, "head_dim": 1}, {"groups": 8, "state_size": 128, "norm_eps": 1e-5, "conv_bias": True}),
        ({"hidden_size": 64, "head_dim": 1}, {"heads": 128, "dt_limits": (0, math.inf), "tied": False, "bias": False}),
        ({"num_heads": 8, "head_dim": 2, "time_step_limit": [0, math.inf]}, {"dt_limits": (0, math.inf)}),
        (
            {"num_heads": 8, "head_dim": 2, "time_step_limit": [0.5, {"__float__": "Infinity"}]},
            {"dt_limits": (0.5, math.inf)},
        ),
        ({"num_heads": 8, "head_dim": 2, "time_step_min": 0.01}, {"dt_init": (0.01, 0.1, 1e-4), "init_std": 0.1}),
        ({"num_heads": 8, "head_dim": 3, "expand": 3}, {"residual_float32": True, "conv_width": 4}),
    ],
    ids=str,
)
def test_what_is_absent_is_as_in_transformers(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """A default that differs from theirs changes the numbers of a checkpoint that does not write it."""
    got = config_from_hf(THEIRS | changes)
    assert {name: getattr(got, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "expand=2 times hidden_size=8; expected heads of 6 in all"),
        ({"num_heads": 2, "head_dim": 8}, "groups=8; expected a divisor of heads=2"),
        ({"time_step_limit": [1]}, "time_step_limit=.*expected two numbers"),
        ({"time_step_limit": [1, None]}, "time_step_limit has None"),
        ({"time_step_limit": [2, 1]}, "dt_limits=.*that ascend"),
        ({"time_step_min": 0.0}, "dt_init=.*that ascend"),
        ({"conv_kernel": 0}, "conv_width=0; expected at least 1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"rms_norm": False}, "rms_norm=False; only True"),
        ({"rope_theta": 1.0}, "unknown fields .*rope_theta"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    """A field that the model cannot honour is not dropped in silence."""
    with pytest.raises(ConfigError, match=message):
        config_from_hf(THEIRS | {"num_heads": 8, "head_dim": 2} | changes)


def test_widths_that_transformers_lacks() -> None:
    """Their width is a multiple of the residual stream's."""
    config = dataclasses.replace(SMALL, head_dim=3)
    with pytest.raises(ConfigError, match="heads of 12 in all; transformers wants a multiple of features=8"):
        config_to_hf(config, dtype="float32")
