"""The Llama family against the model kit, and its configuration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dovetail_kernels import DenseMixer, LinearScaling
from dovetail_models import Llama, LlamaConfig, abstract, merge, split
from dovetail_protocols import FullCache, LanguageModel, paths
from dovetail_protocols.testing import check_language_model

WEIGHTS = ["embedding", "layers/*/attention/{query,key,value,out}", "layers/*/mlp/{gate,up,down}"]
TINY = LlamaConfig(vocab_size=24, features=8, hidden=12, layers=2, heads=4, kv_heads=2, head_dim=6, init_std=0.5)


def rebuilder(config: LlamaConfig) -> Any:
    """Return what the kit uses to put transformed weights into the model."""
    definition, params = split(Llama(config, rngs=nnx.Rngs(0)))
    chosen = paths.select(params, WEIGHTS + ([] if config.tied else ["head"]))
    leaves = paths.flatten(params)
    return lambda transform: merge(definition, paths.update(params, {a: transform(leaves[a]) for a in chosen}))


@pytest.mark.parametrize(
    "options",
    [{"rope_scaling": LinearScaling(2.0)}, {"tied": True, "attention_bias": True, "mlp_bias": True, "kv_heads": 1}],
    ids=["untied", "tied with biases"],
)
def test_conformance(options: dict[str, Any]) -> None:
    """What every user of models relies on, with plain and with quantized weights."""
    config = dataclasses.replace(TINY, **options)
    model = Llama(config, rngs=nnx.Rngs(0))
    assert isinstance(model, LanguageModel)
    check_language_model(
        model, make_mixer=lambda segments: DenseMixer.of(segments, segments), rebuild=rebuilder(config)
    )


@pytest.mark.parametrize(("param_dtype", "dtype"), [("float32", "bfloat16"), ("bfloat16", None)])
def test_dtypes(param_dtype: str, dtype: str | None) -> None:
    """Parameters and activations have the dtypes that were asked for, logits are float32."""
    definition, shapes = abstract(
        lambda: Llama(TINY, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(param_dtype), dtype=dtype and jnp.dtype(dtype))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(param_dtype)}
    tokens = jnp.arange(6, dtype=jnp.int32)

    def forward(params: Any) -> Any:
        model = merge(definition, params)
        hidden, _, _ = model.hidden(tokens, tokens, DenseMixer.of(tokens[None]))
        return hidden, model.unembed(hidden)

    hidden, logits = jax.eval_shape(forward, shapes)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32


def test_initial_weights() -> None:
    """Matrices of the given spread, output projections smaller with depth, norms of one, biases of zero."""
    config = LlamaConfig(
        vocab_size=100, features=64, hidden=96, layers=2, heads=4, init_std=0.05, attention_bias=True, mlp_bias=True
    )
    params = paths.flatten(split(Llama(config, rngs=nnx.Rngs(3)))[1])
    for address, leaf in params.items():
        name = address.rsplit("/", maxsplit=1)[-1]
        if "norm" in address:
            assert (leaf == 1).all()
        elif name.endswith("bias"):
            assert not leaf.any()
        else:
            expected = 0.05 / 2 if name in ("out", "down") else 0.05
            np.testing.assert_allclose(np.std(leaf), expected, rtol=0.1, err_msg=address)
    assert not np.array_equal(params["layers/0/mlp/up"], params["layers/1/mlp/up"])


def test_remat_changes_nothing(summed_loss: Any) -> None:
    """A checkpointed forward gives the same gradients."""
    definition, params = split(Llama(dataclasses.replace(TINY, layers=1), rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 9)), jnp.int32)

    def loss(params: Any) -> jax.Array:
        return summed_loss(merge(definition, params), tokens, tokens)

    plain = jax.jit(jax.grad(loss))(params)
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, remat)


def test_a_token_outside_the_vocabulary_shows(build: Any) -> None:
    """A wrong tokenizer gives NaN in the row, not another token's state; other rows are not touched."""
    tokens = jnp.array([[1, 48, 2], [1, 47, 2]], jnp.int32)
    positions = jnp.array([0, 1, 2, 0, 1, 2], jnp.int32)
    hidden, _, _ = build().hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
    assert np.isnan(hidden[1:3]).all()
    assert np.isfinite(hidden[3:]).all()


def test_sizes() -> None:
    """Derived sizes, what a cache must hold, and the names of the parameters."""
    config = LlamaConfig(vocab_size=8, features=32, hidden=16, layers=3, heads=4)
    assert (config.dim, config.groups) == (8, 4)
    model = Llama(config, rngs=nnx.Rngs(0))
    assert model.cache_specs() == (FullCache(4, 8, 8),) * 3
    assert set(paths.flatten(split(model)[1])) >= {"embedding", "head", "norm/weight", "layers/2/attention/query"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"layers": -1}, "layers=-1"),
        ({"kv_heads": 3}, "kv_heads=3; expected a divisor of heads=4"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"head_dim": 5}, "dim=5"),
        ({"head_dim": None, "features": 9}, "features=9 is no multiple of heads=4"),
        ({"rope_theta": 0.0}, "theta=0.0"),
        ({"max_position": 0}, "max_position=0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"init_std": -1.0}, "init_std=-1.0"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    """A size that cannot be built is refused when the configuration is made."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.usefixtures("untyped")
def test_bad_calls(build: Any) -> None:
    """Batches that do not fit the mixer, and float tokens."""
    model, tokens = build(), jnp.zeros((6,), jnp.int32)
    with pytest.raises(ValueError, match=r"query has shape \(6, 8, 4\); expected \[8, heads, dim\]"):
        model.hidden(tokens, tokens, DenseMixer.of(jnp.zeros((2, 4), jnp.int32)))
    with pytest.raises(TypeError, match="float32; expected integers"):
        model.hidden(tokens.astype(jnp.float32), tokens, DenseMixer.of(tokens[None]))
    with pytest.raises(ValueError, match="the table has shape"):
        model.hidden(tokens, tokens[:3], DenseMixer.of(tokens[None]))
