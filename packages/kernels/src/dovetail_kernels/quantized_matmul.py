"""Products of activations with quantized weights.

``reference`` dequantizes the whole weight. ``blocked`` dequantizes a block of its inner rows at a time, a million
numbers or the rows that share a scale where these are more, so that it never holds more of the float weight than that,
and a product reads it from a cache; scales that are the same for all inner rows multiply the result instead. With
``activations="int8"`` both operands are integers, whose products a CPU computes several times faster than those of
floats.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted
from dovetail_protocols import QuantizedArray

__all__ = ["QUANTIZED_MATMUL", "QuantizedActivations", "quantized_matmul"]

QuantizedActivations: TypeAlias = Literal["int8"] | None
"""How activations are rounded before the product; None leaves them as they are."""

BLOCK = 1 << 20
LEAST_ROWS = 4
MOST_ROWS = (2**31 - 1) // (127 * 128)  # whose products of activations and weights an int32 can sum


def quantized_matmul(
    x: Float[Array, "*tokens inner"],
    w: QuantizedArray,
    *,
    activations: QuantizedActivations = None,
    implementation: Wanted = None,
) -> Float[Array, "*tokens outer"]:
    r"""Return ``x @ w.dequantize()`` in the dtype of `x`, with a block of the dequantized weight in memory at a time.

    Sums are float32 (float64 for float64). With ``activations="int8"`` each row of `x` is rounded to 255 levels,

    .. math:: \hat x = s \; round(x / s), \qquad s = max |x| / 127

    and the result is exactly that of :math:`\hat x` up to float32: sums of products of integers are exact (Dettmers et
    al., arXiv:2208.07339). Gradients flow to `x` as if it had not been rounded, and then not to the weight, which is
    data: training its scales needs ``activations=None``.

    Args:
        x: activations.
        w: ``[inner, outer]`` with integers of up to 8 bits or 8-bit floats, a scale (and zero point) per matrix,
            column, group of consecutive inner rows, or element.
        activations: "int8" rounds the activations, for integer weights.
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit, an unknown option, or float weights for ``activations="int8"``.
        TypeError: `x` is not a float, or `w` not quantized.

    >>> w = QuantizedArray.checked(jnp.full((4, 2), 3, jnp.int8), jnp.array([[0.5, 2.0]]))
    >>> quantized_matmul(jnp.ones((1, 4)), w)
    Array([[ 6., 24.]], dtype=float32)
    """
    _check(x, w, activations)
    inner, outer = w.shape
    if 0 in (x.size, inner, outer):
        return jnp.zeros((*x.shape[:-1], outer), x.dtype)
    parts = {"scale": w.scale, "zero_point": w.zero_point}
    parts = {name: None if part is None else _columns(part, outer) for name, part in parts.items()}
    rows = x.reshape(-1, inner)
    out = QUANTIZED_MATMUL(implementation, x=rows, qvalue=w.qvalue, activations=activations, **parts)
    return out.reshape(*x.shape[:-1], outer)


def _check(x: jax.Array, w: Any, activations: Any) -> None:
    if not isinstance(w, QuantizedArray):
        raise TypeError(f"w is {type(w).__name__}; expected a QuantizedArray, or use einsum")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; expected a float")
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x {x.shape}, w {w.shape}; expected [..., inner] and [inner, outer]")
    if activations not in (None, "int8"):
        raise ValueError(f"activations={activations!r}; expected None or 'int8'")
    if activations == "int8" and not (jnp.issubdtype(w.qvalue.dtype, jnp.integer) and _bits(w.qvalue.dtype) <= 8):
        raise ValueError(f"activations='int8' with weights of {w.qvalue.dtype}; expected integers of up to 8 bits")


def _bits(dtype: Any) -> int:
    return int(jnp.iinfo(dtype).bits)


def _columns(part: jax.Array, outer: int) -> jax.Array:
    """Spread groups of columns; one column for all stays one."""
    return part if part.shape[1] in (1, outer) else jnp.repeat(part, outer // part.shape[1], axis=1)


def _reference(
    *, x: jax.Array, qvalue: jax.Array, scale: jax.Array, zero_point: jax.Array | None, activations: Any
) -> jax.Array:
    wide = x.astype(exact(x.dtype))
    weight = _dequantized(qvalue, scale.astype(wide.dtype), zero_point)
    if activations is not None:
        levels, unit = _rounded(wide)
        wide, weight = wide + jax.lax.stop_gradient(levels * unit - wide), jax.lax.stop_gradient(weight)
    return (wide @ weight).astype(x.dtype)


def _dequantized(qvalue: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """Return the float weight; scales along the inner axis are one, one per group, or one per row."""
    return QuantizedArray(qvalue, scale, zero_point, scale.dtype).dequantize()


def _rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return whole numbers from -127 to 127, and what one of them stands for in each row."""
    unit = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(unit > 0, unit, 1)), unit


def _supports(call: Call) -> Literal[True] | str:
    if call.arguments["activations"] is None:
        needs = f"needs platform cpu, not {call.platform}, unless activations are int8"
        return True if call.platform == "cpu" else needs
    qvalue, scale, zero_point = (call.arguments[name] for name in ("qvalue", "scale", "zero_point"))
    rows = qvalue.shape[0] // _groups(scale, zero_point)
    return True if rows <= MOST_ROWS else f"{rows} inner rows share a scale; int32 holds the sums of {MOST_ROWS}"


def _configs(call: Call) -> Iterator[dict[str, int]]:
    if call.arguments["activations"] is None:
        yield from ({"rows": n} for n in (128, 256, 512, 1024, 2048) if n < call.arguments["qvalue"].shape[0])


def _blocked(
    *,
    x: jax.Array,
    qvalue: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    activations: Any,
    rows: int | None = None,
) -> jax.Array:
    wide, (inner, outer) = exact(x.dtype), qvalue.shape
    parts = alike(x.astype(wide), qvalue, scale.astype(wide), zero_point)
    if activations is not None:
        return _integers(*parts).astype(x.dtype)
    wide_x, qvalue, scale, zero_point = parts
    late = scale.shape[0] == 1
    weight = QuantizedArray(qvalue, jnp.ones((1, 1), wide) if late else scale, zero_point, wide)
    group = math.lcm(*(inner // part.shape[0] for part in parts[2:] if part is not None and part.shape[0] > 1))
    size = min(inner, max(group, (rows or BLOCK // outer) // group * group))
    whole = inner // size * size
    out = wide_x[:, whole:] @ _inner(weight, whole, inner).dequantize() if whole < inner else jnp.zeros((), wide)
    if whole:
        out = out + _sum_of_blocks(wide_x[:, :whole], _inner(weight, 0, whole), whole // size)
    return (out * scale if late else out).astype(x.dtype)


def _inner(w: QuantizedArray, low: int, high: int) -> QuantizedArray:
    """Return some inner rows, whole groups of them."""

    def cut(part: jax.Array) -> jax.Array:
        group = w.shape[0] // part.shape[0]
        return part if part.shape[0] == 1 else part[low // group : high // group]

    return jax.tree.map(cut, w)


def _sum_of_blocks(x: jax.Array, w: QuantizedArray, count: int) -> jax.Array:
    """Add up the products of equal blocks; the backward pass dequantizes each again."""
    if count == 1:
        return x @ w.dequantize()
    (rows, inner), outer = x.shape, w.shape[1]

    def split(part: jax.Array) -> jax.Array:
        part = jnp.broadcast_to(part, (count, part.shape[1])) if part.shape[0] == 1 else part
        return part.reshape(count, -1, part.shape[1])

    @jax.checkpoint
    def add(total: jax.Array, now: tuple[jax.Array, QuantizedArray]) -> tuple[jax.Array, None]:
        return total + now[0] @ now[1].dequantize(), None

    parts = x.reshape(rows, count, inner // count).swapaxes(0, 1), jax.tree.map(split, w)
    start, _ = alike(jnp.zeros((rows, outer), x.dtype), x)
    return jax.lax.scan(add, start, parts)[0]


@jax.custom_vjp
def _integers(x: jax.Array, qvalue: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """Return products of integers, exact, times both scales; groups of inner rows are a batch."""
    levels, unit = _rounded(x)
    rows, (inner, outer) = x.shape[0], qvalue.shape
    groups = _groups(scale, zero_point)
    levels = levels.astype(jnp.int8).reshape(rows, groups, inner // groups).swapaxes(0, 1)
    levels = jnp.pad(levels, ((0, 0), (0, max(0, LEAST_ROWS - rows)), (0, 0)))
    shift = 128 if qvalue.dtype == jnp.uint8 else 0
    weight = (qvalue.astype(jnp.int16) - shift).astype(jnp.int8).reshape(groups, -1, outer)
    sums = jax.lax.dot_general(levels, weight, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.int32)
    out = sums[:, :rows].astype(x.dtype)
    if zero_point is not None or shift:
        zero_point = jnp.zeros((1, 1), x.dtype) if zero_point is None else zero_point
        total = jnp.sum(levels[:, :rows], axis=2, dtype=jnp.int32).astype(x.dtype)[..., None]
        out = out - total * _per(zero_point.astype(x.dtype) - shift, groups)
    return jnp.sum(out * _per(scale, groups), axis=0) * unit


def _groups(*parts: Any) -> int:
    """Return how many groups of inner rows have the same scale and zero point."""
    return math.lcm(*(part.shape[0] for part in parts if part is not None))


def _per(part: jax.Array, groups: int) -> jax.Array:
    return jnp.repeat(part, groups // part.shape[0], axis=0)[:, None]


def _integers_forward(*operands: Any) -> tuple[jax.Array, Any]:
    return _integers(*operands), operands


def _integers_backward(operands: Any, gradient: jax.Array) -> tuple[Any, ...]:
    x, qvalue, scale, zero_point = operands
    weight = QuantizedArray(qvalue, scale, zero_point, x.dtype).dequantize()
    none = np.zeros(qvalue.shape, jax.dtypes.float0)
    return gradient @ weight.T, none, jnp.zeros_like(scale), _no_gradient(zero_point)


def _no_gradient(part: jax.Array | None) -> Any:
    if part is None or jnp.issubdtype(part.dtype, jnp.floating):
        return None if part is None else jnp.zeros_like(part)
    return np.zeros(part.shape, jax.dtypes.float0)


_integers.defvjp(_integers_forward, _integers_backward)


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    x, qvalue, scale = (call.arguments[name] for name in ("x", "qvalue", "scale"))
    exactly = {
        "dtype": str(x.dtype),
        "weight": str(qvalue.dtype),
        "group": qvalue.shape[0] // scale.shape[0],
        "zero_point": call.arguments["zero_point"] is not None,
        "activations": str(call.arguments["activations"]),
    }
    return exactly, {"rows": x.shape[0], "inner": qvalue.shape[0], "outer": qvalue.shape[1]}


QUANTIZED_MATMUL = Operation(
    "quantized_matmul",
    (
        Implementation(
            "blocked",
            _blocked,
            _supports,
            configs=_configs,
            gradient="first order, reverse mode with int8 activations",
            features="on gpu and tpu int8 activations only",
        ),
        Implementation("reference", _reference),
    ),
    accumulation="float32 (float64 for float64); int32 with int8 activations",
    error="1e-6 of the largest value in float32, 1e-2 in bfloat16; of rounded activations with int8",
    key=_key,
    outcome=lambda _, axes: PartitionSpec(axes["x"][0]),
)
