"""Kit of `Mixer`: attention as a dense float64 reference computes it, for every segment layout and head grouping."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols.testing import reference
from dovetail_protocols.testing._rules import close_to, require
from dovetail_protocols.testing.latent import check_latent
from dovetail_protocols.testing.recurrence import check_recur

__all__ = ["MixerCase", "check_mixer"]


class MixerCase(NamedTuple):
    """One call of `Mixer.attend`; two rows of `time` tokens in several segments, with padding unless `full`."""

    heads: int = 2
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    time: int = 12
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    full: bool = False


CASES = (
    MixerCase(),
    MixerCase(full=True),
    MixerCase(heads=4, kv_heads=2),
    MixerCase(heads=4, kv_heads=1, value_dim=4),
    MixerCase(window=1),
    MixerCase(window=5, heads=4),
    MixerCase(window=100),
    MixerCase(softcap=0.7),
    MixerCase(sinks=True, heads=4, window=5),
    MixerCase(time=1),
)


def check_mixer(
    make_mixer: Callable[[Any], Any], *, cases: Sequence[MixerCase] = CASES, tolerance: float = 2e-5
) -> None:
    """Check the dense (whole sequences at once) form of a mixer.

    Args:
        make_mixer: ``make_mixer(segment_ids)`` returns a mixer for rows with these int32 segments ``[batch, time]``.
        cases: the calls to compare.
        tolerance: of outputs and gradients in float32, relative to the largest value.

    Raises:
        ConformanceError: a rule is broken.
    """
    for case in cases:
        _check_case(make_mixer, case, tolerance)
    mixer = make_mixer(jnp.ones((1, 2), jnp.int32))
    for name in ("attend", "attend_latent", "recur", "totals", "choose"):
        rule = (
            "Mixer: it has attend, attend_latent, recur, totals and choose; what it does not offer raises "
            "NotImplementedError"
        )
        require(callable(getattr(mixer, name, None)), rule, missing=name)
    check_recur(make_mixer, tolerance)
    check_latent(make_mixer, _segments(MixerCase()), tolerance)
    for full in (True, False):
        _check_totals(make_mixer, _segments(MixerCase(full=full)))
    _check_choose(mixer)


def _check_choose(mixer: Any) -> None:
    given = np.array([[3, 0], [1, 2]], np.int32)
    traced = not getattr(mixer, "per_layer", True)
    got = jax.jit(lambda layer, experts: mixer.choose(layer if traced else 0, experts)[0])(0, jnp.asarray(given))
    same = got.shape == given.shape and bool(np.all((np.asarray(got) == given) | (np.asarray(got) == -1)))
    require(same, "Mixer: choose keeps a router's choice, in every form, where nothing was chosen before", got=got)
    structure = jax.tree.structure(mixer.choose(0, jnp.asarray(given))[1]) == jax.tree.structure(mixer)
    require(structure, "Mixer: the mixer after choose is a pytree of the same structure, as a scan needs it")


def _check_totals(make_mixer: Callable[[Any], Any], segments: np.ndarray) -> None:
    values = np.random.default_rng(3).standard_normal((segments.size, 3)).astype(np.float32)
    got = np.asarray(jax.jit(make_mixer(jnp.asarray(segments)).totals)(jnp.asarray(values)), np.float64)
    require(got.ndim == 2 and got.shape[1] == 3, "Mixer: totals are [sequences, values]", shape=got.shape)
    rows = values.astype(np.float64).reshape(*segments.shape, -1)
    pairs = [(row, key) for row in range(len(segments)) for key in np.unique(segments[row]) if key]
    expected = np.array([rows[row][segments[row] == key].sum(0) for row, key in pairs])
    found = got[np.any(got != 0, axis=1)]
    rule = "Mixer: totals has the sums over the tokens of each sequence without padding, and rows of 0"
    require(len(found) == len(expected), rule, sequences=len(expected), rows=len(found))
    error = close_to(found[np.argsort(found[:, 0])], expected[np.argsort(expected[:, 0])], 1e-5)
    require(error is None, rule, segments=segments.tolist(), error=error)


def _segments(case: MixerCase) -> np.ndarray:
    if case.full or case.time < 4:
        return np.ones((2, case.time), np.int32)
    third = case.time // 3
    first = np.repeat([1, 2, 0], [third, case.time - 2 * third, third])
    second = np.repeat([7, 3], [1, case.time - 1])
    return np.stack([first, second]).astype(np.int32)


def _check_case(make_mixer: Callable[[Any], Any], case: MixerCase, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    segments = _segments(case)
    shapes = ((case.heads, case.key_dim), (case.kv_heads, case.key_dim), (case.kv_heads, case.value_dim))
    arrays = [rng.standard_normal((segments.size, *shape)).astype(np.float32) for shape in shapes]
    weight = jnp.asarray(rng.standard_normal((segments.size, case.heads, case.value_dim)), jnp.float32)
    real = (segments != 0).reshape(-1)
    mixer = make_mixer(jnp.asarray(segments))
    sinks = rng.standard_normal(case.heads).astype(np.float32) if case.sinks else None
    options: dict[str, Any] = {"scale": 0.37, "window": case.window, "softcap": case.softcap}

    @jax.jit
    def run(qkv: list[Any]) -> tuple[Any, Any]:
        def objective(qkv: list[Any]) -> tuple[jax.Array, Any]:
            given = {} if sinks is None else {"sinks": jnp.asarray(sinks)}
            out, after = mixer.attend(0, qkv[0], qkv[1], qkv[2], **options, **given)
            counted = out.astype(jnp.float32).reshape(weight.shape) * weight
            return jnp.sum(jnp.where(jnp.asarray(real)[:, None, None], counted, 0.0)), (out, after)

        return jax.value_and_grad(objective, has_aux=True)(qkv)

    qkv = [jnp.asarray(array) for array in arrays]
    (_, (out, after)), gradients = run(qkv)
    expected = reference.attention(arrays[0], arrays[1], arrays[2], segments, **options, sinks=sinks)
    shape = (segments.size, case.heads, case.value_dim)
    require(out.shape == shape, "Mixer: attend returns [tokens, heads, value_dim]", shape=out.shape, expected=shape)
    require(out.dtype == jnp.float32, "Mixer: the output has the dtype of the values", dtype=out.dtype)
    require(np.isfinite(out).all(), "Mixer: the output is finite, padding included", case=case)
    error = close_to(np.asarray(out)[real], expected[real], tolerance)
    rule = "Mixer: attend is causal attention within each segment of a row"
    require(error is None, rule, case=case, segments=segments.tolist(), error=error)
    same = jax.tree.structure(after) == jax.tree.structure(mixer)
    require(same, "Mixer: the mixer after a call is a pytree of the same structure, as a scan needs it")
    _check_gradient(lambda qkv: run(qkv)[0][0], gradients, qkv, case)


def _check_gradient(
    objective: Callable[[list[Any]], Any], gradients: list[jax.Array], qkv: list[jax.Array], case: MixerCase
) -> None:
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        finite = np.isfinite(gradient).all()
        require(finite, "Mixer: gradients are finite, padding included", argument=name, case=case)
    rng = np.random.default_rng(1)
    step = 1e-2
    direction = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in qkv]
    above, below = (
        objective([x + jnp.float32(sign * step) * d for x, d in zip(qkv, direction, strict=True)]) for sign in (1, -1)
    )
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradients, direction, strict=True))
    error = close_to(slope, (float(above) - float(below)) / (2 * step), 2e-2)
    require(error is None, "Mixer: gradients are those of the output", case=case, error=error)
