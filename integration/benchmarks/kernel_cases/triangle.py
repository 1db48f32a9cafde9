"""Triangle multiplication, forward and backward, against tokamax."""

from typing import Any

from kernel_cases.shape import Shape, gradients

CASES = [Shape("outgoing fwd+bwd", {"n": 128, "features": 64, "hidden": 64}, {}, peer="tokamax", inner=2)]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Pairs, then the parameters in tokamax's order."""
    import numpy as np

    rng = np.random.default_rng(0)
    n, features, hidden = c["n"], c["features"], c["hidden"]
    shapes = [(n, n, features), (features, 2, hidden), (features, 2, hidden), (hidden, features), (features, features)]
    shapes += [(features,)] * 2 + [(hidden,)] * 2
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def ours(c: dict[str, Any]) -> Any:
    """Ours."""
    from dovetail_kernels import TriangleWeights, triangle_multiplication

    del c

    def call(x: Any, project: Any, gate: Any, out: Any, gate_out: Any, s: Any, b: Any, t: Any, d: Any) -> Any:
        return triangle_multiplication(x, TriangleWeights((s, b), project, gate, (t, d), out, gate_out))

    return gradients(call, tuple(range(9)))


def tokamax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """tokamax's."""
    import jax.numpy as jnp
    import tokamax

    def call(x: Any, *weights: Any) -> Any:
        mask = jnp.ones((c["n"], c["n"]), bool)
        return tokamax.triangle_multiplication(x, mask, *weights, triangle_type="outgoing", epsilon=1e-6)

    return f"tokamax {tokamax.__version__}", gradients(call, tuple(range(9)))
