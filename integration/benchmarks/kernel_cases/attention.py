"""Attention, forward and backward, against `jax.nn.dot_product_attention` and tokamax."""

from typing import Any

from kernel_cases.shape import Shape, gradients

BASE = {"batch": 1, "time": 2048, "heads": 4, "dim": 64, "window": 0}
VARY = {"time": 128, "heads": 1, "dim": 16}
CASES = [
    Shape("causal fwd+bwd", BASE, VARY),
    Shape("causal window fwd+bwd", {**BASE, "window": 256}, {**VARY, "window": 64}),
    Shape("causal fwd+bwd", BASE, {}, peer="tokamax"),
    Shape("causal window fwd+bwd", {**BASE, "window": 256}, {}, peer="tokamax"),
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Query, key and value."""
    import numpy as np

    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((c["batch"], c["time"], c["heads"], c["dim"]), np.float32) for _ in range(3))


def ours(c: dict[str, Any]) -> Any:
    """Our attention with a symbolic mask."""
    from dovetail_kernels import attention, causal, window

    mask = causal() & window(c["window"]) if c["window"] else causal()
    return gradients(lambda q, k, v: attention(q, k, v, mask), (0, 1, 2))


def jax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """jax.nn's attention."""
    import jax

    size = (c["window"] - 1, 0) if c["window"] else None

    def call(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=size)

    return f"jax.nn {jax.__version__}", gradients(call, (0, 1, 2))


def tokamax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """tokamax's attention."""
    import tokamax

    size = (c["window"] - 1, 0) if c["window"] else None

    def call(q: Any, k: Any, v: Any) -> Any:
        return tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=size)

    return f"tokamax {tokamax.__version__}", gradients(call, (0, 1, 2))
