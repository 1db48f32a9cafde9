"""Kit of the weights seam (`einsum`, `take`) and `FakeQuantized`, the twin trees that it and the model kit use."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols import paths
from dovetail_protocols.quantized import QuantizedArray
from dovetail_protocols.testing._rules import close_to, require

__all__ = ["FakeQuantized", "check_quantized"]


class FakeQuantized(NamedTuple):
    """Two trees of the same values: in one the weights are arrays, in the other QuantizedArrays.

    The values are the given ones rounded to int8 times a power of two per last-axis element, so that both trees hold
    exactly the same numbers in any float dtype of at least 8 significant bits: whatever accepts quantized weights must
    give the same results with both.

    Attributes:
        dense: plain arrays of the original dtypes.
        quantized: the same with QuantizedArrays.

    >>> twins = FakeQuantized.of({"w": jnp.ones((4, 2)), "bias": jnp.ones(2)})
    >>> type(twins.quantized["w"]).__name__, bool((twins.quantized["w"].dequantize() == twins.dense["w"]).all())
    ('QuantizedArray', True)
    """

    dense: Any
    quantized: Any

    @classmethod
    def of(cls, tree: Any, patterns: str | Iterable[str] = "**") -> "FakeQuantized":
        """Quantize the float leaves of at least two dimensions whose address matches.

        Raises:
            PatternError: a pattern matches no leaf.
        """
        chosen = set(paths.select(tree, patterns))

        def twin(key_path: Sequence[Any], leaf: Any) -> Any:
            eligible = jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            return fake_quantize(leaf) if eligible and paths.path_of(key_path) in chosen else leaf

        quantized = jax.tree_util.tree_map_with_path(twin, tree)
        dense = jax.tree.map(_dense, quantized, is_leaf=_is_quantized)
        return cls(dense, quantized)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


def _dense(leaf: Any) -> Any:
    return _dequantize(leaf) if _is_quantized(leaf) else leaf


@jax.jit
def fake_quantize(array: jax.Array) -> QuantizedArray:
    """Round an array to int8 values times a power of two per element of the last axis."""
    wide = array.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(wide.ndim - 1)), keepdims=True)
    exponent = jnp.ceil(jnp.log2(jnp.maximum(largest, jnp.float32(1e-30)) / jnp.float32(127)))
    scale = jnp.ldexp(jnp.float32(1), exponent.astype(jnp.int32))
    return QuantizedArray(jnp.round(wide / scale).astype(jnp.int8), scale, None, array.dtype)


@jax.jit
def _dequantize(array: QuantizedArray) -> jax.Array:
    return array.dequantize()


class _Layout(NamedTuple):
    name: str
    groups: Callable[[tuple[int, ...]], tuple[int, ...]]
    qtype: Any = jnp.int8
    zero: bool = False
    dtype: Any = jnp.float32


_LAYOUTS = (
    _Layout("a zero point per group", lambda shape: (shape[0] // 4, *shape[1:]), jnp.uint8, zero=True),
    _Layout("one scale", lambda shape: (1,) * len(shape)),
    _Layout("a scale per last-axis element", lambda shape: (*(1,) * (len(shape) - 1), shape[-1])),
    _Layout("a scale per first-axis element", lambda shape: (shape[0], *(1,) * (len(shape) - 1))),
    _Layout("a scale per group of the first axis", lambda shape: (shape[0] // 4, *shape[1:])),
    _Layout("int4", lambda shape: (*(1,) * (len(shape) - 1), shape[-1]), jnp.int4),
    _Layout("float8", lambda shape: (*(1,) * (len(shape) - 1), shape[-1]), jnp.float8_e4m3fn),
    _Layout("logical bfloat16", lambda shape: (*(1,) * (len(shape) - 1), shape[-1]), dtype=jnp.bfloat16),
)
_EINSUMS = (
    ("td,df->tf", (6, 8), (8, 12)),
    ("td,dhk->thk", (6, 8), (8, 4, 2)),
    ("thk,hkd->td", (6, 4, 2), (4, 2, 8)),
    ("td,fd->tf", (6, 8), (12, 8)),
)


def check_quantized(
    einsum: Callable[[str, Any, Any], Any],
    take: Callable[[Any, Any], Any],
    *,
    einsums: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = _EINSUMS,
    tolerance: float = 1e-5,
) -> None:
    """Check that the seam gives with a QuantizedArray what it gives with the dequantized array.

    Args:
        einsum: ``einsum(spec, x, w)``.
        take: ``take(w, ids)``, rows of a table.
        einsums: ``(spec, shape of x, shape of w)``.
        tolerance: in float32, relative to the largest value; 1000 times as much in bfloat16.

    Raises:
        ConformanceError: a rule is broken.
    """
    for layout in _LAYOUTS:
        allowed = tolerance * (1000 if layout.dtype == jnp.bfloat16 else 1)
        _check_einsums(einsum, einsums, layout, allowed)
        table, values = _weight(layout, (16, 6))
        _check_take(take, table, values, layout.name)


def _weight(layout: _Layout, shape: tuple[int, ...]) -> tuple[QuantizedArray, np.ndarray]:
    """A quantized array, and its values as its documentation defines them."""
    rng = np.random.default_rng(0)
    groups = layout.groups(shape)
    low, high = {jnp.uint8: (0, 256), jnp.int4: (-8, 8)}.get(layout.qtype, (-100, 101))
    qvalue = rng.integers(low, high, shape).astype(np.float32).astype(layout.qtype)
    scale = 2.0 ** rng.integers(-8, -4, groups).astype(np.float32)
    zero = rng.integers(low, high, groups).astype(np.float32).astype(layout.qtype) if layout.zero else None
    values = _spread(scale, shape) * (qvalue.astype(np.float64) - (0 if zero is None else _spread(zero, shape)))
    qvalue, scale, zero = jax.device_put((qvalue, scale, zero))
    return QuantizedArray.checked(qvalue, scale, zero, layout.dtype), values.astype(layout.dtype)


def _spread(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis, (n, s) in enumerate(zip(shape, part.shape, strict=True)):
        part = np.repeat(part, n // s, axis=axis)
    return part.astype(np.float64)


def _check_einsums(
    einsum: Callable[[str, Any, Any], Any],
    einsums: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    layout: _Layout,
    tolerance: float,
) -> None:
    def total(spec: str, x: Any, w: Any) -> tuple[jax.Array, jax.Array]:
        out = einsum(spec, x, w)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    @jax.jit
    def run(xs: list[Any], weights: list[Any]) -> list[tuple[jax.Array, jax.Array]]:
        graded = jax.value_and_grad(total, argnums=1, has_aux=True)
        results = [graded(spec, x, w) for (spec, _, _), x, w in zip(einsums, xs, weights, strict=True)]
        return [(out, gradient) for (_, out), gradient in results]

    rng = np.random.default_rng(1)
    xs = [jax.device_put(rng.standard_normal(shape).astype(layout.dtype)) for _, shape, _ in einsums]
    weights, values = zip(*(_weight(layout, shape) for _, _, shape in einsums), strict=True)
    results = run(xs, jax.device_put(list(values))), run(xs, list(weights))
    for (spec, _, _), x, w, with_dense, got in zip(einsums, xs, values, *results, strict=True):
        case = f"{layout.name}, {spec}"
        expected = np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))
        for kind, out in (("an array", with_dense[0]), ("a QuantizedArray", got[0])):
            error = close_to(out, expected, tolerance)
            require(error is None, f"Seam: einsum with {kind} is the contraction of its values", case=case, error=error)
            rule = "Seam: einsum returns the logical dtype"
            require(out.dtype == layout.dtype, rule, case=case, dtype=out.dtype)
        error = close_to(got[1], with_dense[1], tolerance)
        require(error is None, "Seam: the gradient of x is that with the dequantized weight", case=case, error=error)


def _check_take(take: Callable[[Any, Any], Any], table: QuantizedArray, values: np.ndarray, case: str) -> None:
    ids = np.array([3, 0, 15, 3, 7], np.int32)
    for kind, operand in (("an array", jax.device_put(values)), ("a QuantizedArray", table)):
        got = jax.jit(take)(operand, ids)
        good = got.dtype == table.dtype and np.array_equal(got, values[ids])
        require(good, f"Seam: take from {kind} gives the rows of its values", case=case, dtype=got.dtype)
