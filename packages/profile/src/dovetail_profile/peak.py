"""How fast the present device can multiply matrices: from a datasheet where there is one, measured otherwise."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["known_peak", "measure_matmul_rate", "peak_flops"]

# Dense bfloat16 (and float16) tensor-core or MXU flops per second and chip, from the vendors' public datasheets.
# The first entry that is part of the device kind counts.
_DENSE_16_BIT = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)


def known_peak(device_kind: str, dtype: Any = "bfloat16") -> float | None:
    """Return the datasheet's dense matmul flops per second of one device, or None if it is not in the table.

    Args:
        device_kind: ``jax.devices()[0].device_kind``.
        dtype: only bfloat16, and float16 on GPUs, are known.

    >>> known_peak("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    """
    name = jnp.dtype(dtype).name
    if name != "bfloat16" and (name != "float16" or device_kind.startswith("TPU")):
        return None
    return next((rate for part, rate in _DENSE_16_BIT if part in device_kind), None)


def peak_flops(dtype: Any = "float32", *, seconds: float = 0.5) -> float:
    """Return matmul flops per second of the first device, the denominator of model flops utilisation.

    The datasheet's figure where `known_peak` has one; otherwise a measurement that takes about `seconds` on a CPU.
    Multiply by the number of devices for a whole mesh (CPU "devices" of one host share its cores).

    >>> peak_flops("float32", seconds=0.05) > 0
    True
    """
    device = jax.devices()[0]
    known = known_peak(device.device_kind, dtype)
    if known is not None:
        return known
    size = 1024 if device.platform == "cpu" else 8192
    return measure_matmul_rate(size, size, size, dtype, seconds=seconds)


def measure_matmul_rate(m: int, n: int, k: int, dtype: Any = "float32", *, seconds: float = 0.5) -> float:
    """Return the measured flops per second of ``[m, k] @ [k, n]`` on the first device: the median of several runs.

    Args:
        m: rows of the left operand.
        n: columns of the right operand.
        k: the contracted dimension.
        dtype: of the operands and the result.
        seconds: how long to measure, not counting compilation; at least 3 products are timed.

    Raises:
        ValueError: a size is below 1 or `seconds` is not positive.
    """
    if min(m, n, k) < 1:
        raise ValueError(f"measure_matmul_rate(m={m}, n={n}, k={k}); every size must be at least 1")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}; give a positive time")
    a, b = (jnp.full(shape, 0.5, dtype, device=jax.devices()[0]) for shape in ((m, k), (k, n)))
    product = _product().lower(a, b).compile()
    jax.block_until_ready(product(a, b))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        jax.block_until_ready(product(a, b))
        times.append(time.perf_counter() - begin)
    return 2.0 * m * n * k / statistics.median(times)


@functools.cache
def _product() -> Any:
    return jax.jit(jnp.matmul)
