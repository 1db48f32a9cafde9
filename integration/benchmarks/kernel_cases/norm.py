"""Layer and RMS normalisation, forward and backward, against tokamax.

Forward both are one fusion of the same instructions that moves memory at its full rate, so each process's pages decide.
"""

from typing import Any

from kernel_cases.shape import Shape, gradients

BASE = {"tokens": 4096, "features": 1024, "axis": 1, "centred": 1, "gradient": 1}
VARY = {"tokens": 128, "features": 64}
CASES = [
    Shape(
        name,
        {**BASE, **options},
        VARY,
        peer="tokamax",
        inner=10 if options.get("gradient", 1) else 100,
        starts=1 if options.get("gradient", 1) else 5,
    )
    for name, options in (
        ("layer fwd", {"gradient": 0}),
        ("layer fwd+bwd", {}),
        ("rms fwd", {"centred": 0, "gradient": 0}),
        ("rms fwd+bwd", {"centred": 0}),
        ("layer first axis fwd+bwd", {"axis": 0}),
    )
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Activations, weight and bias."""
    import numpy as np

    rng = np.random.default_rng(0)
    features = (c["tokens"], c["features"])[c["axis"]]
    shapes = ((c["tokens"], c["features"]), (features,), (features,))
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def ours(c: dict[str, Any]) -> Any:
    """Our norms, with Gemma's offset of the weight."""
    from dovetail_kernels import layer_norm, rms_norm

    function = layer_norm if c["centred"] else rms_norm

    def call(x: Any, weight: Any, bias: Any) -> Any:
        return function(x, weight, bias=bias, axis=c["axis"], weight_offset=1.0)

    return gradients(call, (0, 1, 2)) if c["gradient"] else call


def tokamax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """tokamax's norm."""
    import tokamax

    def call(x: Any, weight: Any, bias: Any) -> Any:
        options = {"axis": c["axis"], "scale_offset": 1.0, "subtract_mean": bool(c["centred"])}
        return tokamax.layer_norm(x, weight, bias, **options)

    return f"tokamax {tokamax.__version__}", gradients(call, (0, 1, 2)) if c["gradient"] else call
