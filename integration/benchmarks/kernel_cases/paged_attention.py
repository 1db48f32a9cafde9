"""Decode over a paged cache, lengths log-uniform, against dense attention on the padded cache."""

from typing import Any

from kernel_cases.shape import Shape

BASE = {"rows": 16, "longest": 2048, "heads": 8, "kv_heads": 2, "dim": 64, "page_size": 16, "dtype": "float32"}
VARY = {"rows": 1, "longest": 128, "dim": 16}
CASES = [
    Shape("decode", BASE, VARY, inner=60),
    Shape("decode, int8 cache", {**BASE, "dtype": "int8"}, VARY, inner=60, tolerance=3e-2),
    Shape("decode, pages of 1", {**BASE, "page_size": 1}, {}, inner=60),
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Query; the padded cache; the same tokens in pages in a random order, with tables and lengths."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows, longest, size = c["rows"], c["longest"], c["page_size"]
    lengths = np.exp(rng.uniform(np.log(32), np.log(longest), rows)).astype(np.int32)
    query = rng.standard_normal((rows, c["heads"], c["dim"]), np.float32)
    tables = rng.permutation(rows * longest // size).astype(np.int32).reshape(rows, -1)
    dense, pools = [], []
    for _ in range(2):
        x = rng.standard_normal((rows, longest, c["kv_heads"], c["dim"]), np.float32)
        pool = np.empty((tables.size, c["kv_heads"], size, c["dim"]), np.float32)
        pool[tables] = x.reshape(rows, -1, size, *x.shape[2:]).transpose(0, 1, 3, 2, 4)
        dense.append(x)
        pools.append(pool)
    if c["dtype"] == "int8":
        scales = [np.abs(pool).max(-1, keepdims=True) / 127 for pool in pools]
        pools = [np.round(pool / scale).astype(np.int8) for pool, scale in zip(pools, scales, strict=True)] + scales
    return query, tables, lengths, *dense, *pools


def ours(c: dict[str, Any]) -> Any:
    """Our paged attention."""
    del c
    import jax.numpy as jnp

    from dovetail_kernels import paged_attention
    from dovetail_protocols import QuantizedArray

    def call(query: Any, tables: Any, lengths: Any, _k: Any, _v: Any, keys: Any, values: Any, *scales: Any) -> Any:
        if scales:
            dtype = jnp.dtype("float32")
            keys, values = (
                QuantizedArray(x, scale, dtype=dtype) for x, scale in zip((keys, values), scales, strict=True)
            )
        return paged_attention(query, keys, values, tables, lengths)

    return call


def jax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """jax.nn's attention with lengths."""
    del c
    import jax

    def call(query: Any, _tables: Any, lengths: Any, keys: Any, values: Any, *_: Any) -> Any:
        return jax.nn.dot_product_attention(query[:, None], keys, values, key_value_seq_lengths=lengths)[:, 0]

    return f"jax.nn {jax.__version__}, padded", call
