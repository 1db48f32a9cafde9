"""Kit of `Mixer.attend_latent`: attention with the keys and values that latents expand to, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols.testing import reference
from dovetail_protocols.testing._rules import close_to, require
from dovetail_protocols.testing.quantized import FakeQuantized

__all__ = ["check_latent"]

HEADS, LATENT, ROPE, NOPE, VALUE = 3, 6, 2, 4, 5
SCALE = 0.31


def check_latent(make_mixer: Callable[[Any], Any], segments: np.ndarray, tolerance: float) -> None:
    """Check the latent attention of a mixer, if it offers it.

    Args:
        make_mixer: as for `check_mixer`.
        segments: int32 ``[batch, time]``, 0 for padding.
        tolerance: of outputs and gradients in float32, relative to the largest value.

    Raises:
        ConformanceError: a rule is broken.
    """
    rng, tokens = np.random.default_rng(4), segments.size
    shapes = (
        (tokens, HEADS, NOPE + ROPE),
        (tokens, LATENT),
        (tokens, ROPE),
        (LATENT, HEADS, NOPE),
        (LATENT, HEADS, VALUE),
    )
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    mixer, real = make_mixer(jnp.asarray(segments)), (segments != 0).reshape(-1)

    @jax.jit
    def run(query: Any, latent: Any, rope_key: Any, *expand: Any) -> tuple[Any, Any]:
        return mixer.attend_latent(0, query, latent, rope_key, expand, scale=SCALE)

    try:
        out, after = run(*arrays)
    except NotImplementedError:
        return
    _check_output(out, expected(arrays, segments), real, tolerance)
    same = jax.tree.structure(after) == jax.tree.structure(mixer)
    require(same, "Mixer: the mixer after attend_latent is a pytree of the same structure, as a scan needs it")
    twins = FakeQuantized.of({"key": arrays[3], "value": arrays[4]})
    pair = [run(*arrays[:3], *tree.values())[0] for tree in (twins.quantized, twins.dense)]
    error = close_to(np.asarray(pair[0])[real], np.asarray(pair[1])[real], tolerance)
    require(error is None, "Mixer: attend_latent takes quantized expansions for what they hold", error=error)
    _check_gradient(lambda *arrays: run(*arrays)[0], arrays, real)


def expected(arrays: Sequence[Any], segments: np.ndarray) -> np.ndarray:
    """Return what `attend_latent` should, by the plain reference of attention."""
    query, latent, rope_key, key, value = (np.asarray(x, np.float64) for x in arrays)
    rope = np.repeat(rope_key[:, None], query.shape[1], axis=1)
    keys = np.concatenate([np.einsum("tl,lhn->thn", latent, key), rope], -1)
    return reference.attention(query, keys, np.einsum("tl,lhv->thv", latent, value), segments, scale=SCALE)


def _check_output(out: Any, wanted: np.ndarray, real: np.ndarray, tolerance: float) -> None:
    rule = "Mixer: attend_latent returns [tokens, heads, value_dim] in the dtype of the query"
    require(out.shape == wanted.shape and out.dtype == jnp.float32, rule, shape=out.shape, dtype=out.dtype)
    require(np.isfinite(out).all(), "Mixer: the output of attend_latent is finite, padding included")
    error = close_to(np.asarray(out)[real], wanted[real], tolerance)
    rule = "Mixer: attend_latent is causal attention within each segment with the expanded keys and values"
    require(error is None, rule, error=error)


def _check_gradient(run: Callable[..., Any], arrays: list[Any], real: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    weight = jnp.asarray(rng.standard_normal((len(real), HEADS, VALUE)) * real[:, None, None], jnp.float32)

    def objective(*arrays: Any) -> jax.Array:
        return jnp.sum(run(*arrays) * weight)

    gradients = jax.grad(objective, argnums=tuple(range(len(arrays))))(*arrays)
    names = ("query", "latent", "rope_key", "the key's expansion", "the value's expansion")
    for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        direction = jnp.asarray(rng.standard_normal(gradient.shape), jnp.float32)
        ends = [
            float(objective(*(x + jnp.float32(sign * 1e-2) * direction if i == j else x for j, x in enumerate(arrays))))
            for sign in (1, -1)
        ]
        error = close_to(float(jnp.vdot(gradient, direction)), (ends[0] - ends[1]) / 2e-2, 2e-2)
        require(error is None, "Mixer: gradients of attend_latent are those of its output", argument=name, error=error)
