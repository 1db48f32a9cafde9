"""Lookups with the gradient of the table, against plain indexing."""

from typing import Any

from kernel_cases.shape import Shape, gradients

CASES = [
    Shape(f"V{vocab}", {"vocab": vocab, "features": features, "tokens": 4096}, {"tokens": 128}, inner=10)
    for vocab, features in ((32000, 256), (50257, 512))
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """The table, and ids of which some come often."""
    import numpy as np

    rng = np.random.default_rng(0)
    table = rng.standard_normal((c["vocab"], c["features"]), np.float32)
    return table, np.minimum(rng.zipf(1.2, c["tokens"]), c["vocab"] - 1).astype(np.int32)


def ours(c: dict[str, Any]) -> Any:
    """Our lookup."""
    del c
    from dovetail_kernels import take

    return gradients(take, (0,))


def jax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """Indexing."""
    del c
    import jax

    return f"jax.numpy {jax.__version__}", gradients(lambda table, ids: table[ids], (0,))
