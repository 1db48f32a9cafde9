"""Gated linear units, forward and backward, against tokamax.

Forward both are two products and one fusion of the same instructions, so several processes of each are measured.
"""

from typing import Any

from kernel_cases.shape import Shape, gradients

BASE = {"batch": 8, "time": 256, "features": 384, "hidden": 1024, "fused": 0, "gradient": 1}
VARY = {"time": 32, "features": 32, "hidden": 64}
CASES = [
    Shape(
        name,
        {**BASE, **options},
        VARY,
        peer="tokamax",
        inner=4 if options.get("gradient", 1) else 10,
        starts=1 if options.get("gradient", 1) else 5,
    )
    for name, options in (
        ("fwd", {"gradient": 0}),
        ("fwd+bwd", {}),
        ("fused fwd", {"fused": 1, "gradient": 0}),
        ("fused fwd+bwd", {"fused": 1}),
    )
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Activations and both weights, as one array where fused."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((c["batch"], c["time"], c["features"]), np.float32)
    both = rng.standard_normal((c["features"], 2, c["hidden"]), np.float32) * c["features"] ** -0.5
    return (x, both) if c["fused"] else (x, both[:, 0], both[:, 1])


def ours(c: dict[str, Any]) -> Any:
    """Our unit."""
    from dovetail_kernels import gated_linear_unit

    return gradients(gated_linear_unit, (0, 1) if c["fused"] else (0, 1, 2)) if c["gradient"] else gated_linear_unit


def tokamax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """tokamax's unit."""
    import jax
    import tokamax

    def call(x: Any, *weights: Any) -> Any:
        return tokamax.gated_linear_unit(x, weights[0] if c["fused"] else weights, activation=jax.nn.silu)

    chosen = (0, 1) if c["fused"] else (0, 1, 2)
    return f"tokamax {tokamax.__version__}", gradients(call, chosen) if c["gradient"] else call
