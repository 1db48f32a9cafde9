"""Kit of the weights seam with adapted weights (`LowRankArray`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols.low_rank import LowRankArray
from dovetail_protocols.quantized import QuantizedArray
from dovetail_protocols.testing._rules import close_to, require

__all__ = ["check_low_rank"]


class _Case(NamedTuple):
    """A product; the weight's axes are so many leading ones and inputs, and outputs."""

    spec: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    leading: int
    inputs: int


_CASES = (
    _Case("td,df->tf", (6, 8), (8, 12), 0, 1),
    _Case("td,dhk->thk", (6, 8), (8, 4, 2), 0, 1),
    _Case("thk,hkd->td", (6, 4, 2), (4, 2, 8), 0, 2),
    _Case("thn,lhn->thl", (6, 4, 2), (8, 4, 2), 0, 1),
    _Case("etd,edf->etf", (3, 6, 8), (3, 8, 4), 1, 1),
)
_RANK, _SCALE = 3, 0.5


def check_low_rank(
    einsum: Callable[[str, Any, Any], Any], take: Callable[[Any, Any], Any], *, tolerance: float = 1e-5
) -> None:
    """Check that the seam gives with a LowRankArray what its formula says, and the gradients of its parts.

    Args:
        einsum: ``einsum(spec, x, w)``.
        take: ``take(w, ids)``, rows of a table.
        tolerance: in float32, relative to the largest value.

    Raises:
        ConformanceError: a rule is broken.
    """
    for quantized in (False, True):
        for magnitude in (False, True):
            name = f"{'quantized' if quantized else 'plain'} base, {'a' if magnitude else 'no'} magnitude"
            for case in _CASES:
                _check_einsum(einsum, case, _weight(case, quantized, magnitude), f"{name}, {case.spec}", tolerance)
            table = _Case("", (), (16, 6), 0, 1)
            _check_take(take, _weight(table, quantized, magnitude), name, tolerance)


def _weight(case: _Case, quantized: bool, magnitude: bool) -> LowRankArray:
    rng = np.random.default_rng(0)
    leading, inputs = case.w[: case.leading], case.w[case.leading : case.leading + case.inputs]
    outputs = case.w[case.leading + case.inputs :]
    base: Any = rng.standard_normal(case.w).astype(np.float32)
    if quantized:
        whole = rng.integers(-100, 101, case.w).astype(np.int8)
        base = QuantizedArray(jnp.asarray(whole), jnp.full((1,) * len(case.w), 1 / 64, jnp.float32))
    a = rng.standard_normal((*leading, *inputs, _RANK)).astype(np.float32)
    b = rng.standard_normal((*leading, _RANK, *outputs)).astype(np.float32)
    lengths = rng.uniform(0.5, 2, (*leading, *outputs)).astype(np.float32) if magnitude else None
    return LowRankArray.checked(*jax.device_put((base, a, b, lengths)), scale=_SCALE)


def _values(w: LowRankArray, case: _Case) -> np.ndarray:
    """The values that the formula gives, in float64."""
    base = w.base.dequantize() if isinstance(w.base, QuantizedArray) else w.base
    a, b = np.asarray(w.a, np.float64), np.asarray(w.b, np.float64)
    groups = int(np.prod(case.w[: case.leading]))
    product = np.matmul(a.reshape(groups, -1, _RANK), b.reshape(groups, _RANK, -1)).reshape(case.w)
    total = np.asarray(base, np.float64) + _SCALE * product
    if w.magnitude is None:
        return total
    axes = tuple(range(case.leading, case.leading + case.inputs))
    lengths = np.expand_dims(np.asarray(w.magnitude, np.float64), axes)
    return total * lengths / np.sqrt((total**2).sum(axes, keepdims=True))


def _check_einsum(einsum: Any, case: _Case, w: LowRankArray, name: str, tolerance: float) -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal(case.x), jnp.float32)
    values = _values(w, case)
    expected = np.einsum(case.spec, np.asarray(x, np.float64), values)
    rule = "Seam: einsum with an adapter is that of its values"
    require_close(einsum(case.spec, x, w), expected, rule, name, tolerance)

    def total(parts: Any, product: Any) -> jax.Array:
        a, b, magnitude = parts
        return jnp.sum(jnp.sin(product(LowRankArray(w.base, a, b, magnitude, w.scale))))

    parts = w.a, w.b, w.magnitude
    got = jax.grad(total)(parts, lambda w: einsum(case.spec, x, w))
    wanted = jax.grad(total)(parts, lambda w: jnp.einsum(case.spec, x, w.dense(), precision="highest"))
    for part, ours, theirs in zip(("a", "b", "magnitude"), got, wanted, strict=True):
        if theirs is not None:
            rule = f"Seam: the gradient of {part} is that of the whole weight's, with the norm held fixed"
            require_close(ours, theirs, rule, name, 10 * tolerance)


def _check_take(take: Any, table: LowRankArray, name: str, tolerance: float) -> None:
    ids = np.array([3, 0, 15, 3, 7], np.int32)
    expected = _values(table, _Case("", (), table.shape, 0, 1))[ids]
    got = jax.jit(take)(table, ids)
    require_close(got, expected, "Seam: take with an adapter gives the rows of its values", name, tolerance)
    require(got.dtype == table.dtype, "Seam: take gives the logical dtype", case=name, dtype=got.dtype)


def require_close(got: Any, expected: Any, rule: str, case: str, tolerance: float) -> None:
    """Require equal values up to a part of the largest."""
    error = close_to(got, expected, tolerance)
    require(error is None, rule, case=case, error=error)
