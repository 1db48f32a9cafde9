"""Grouped matrix products, forward and backward, against `jax.lax.ragged_dot` and tokamax."""

from typing import Any

from kernel_cases.shape import Shape, gradients

FEW = {"rows": 1024, "k": 256, "n": 512, "groups": 16}
MANY = {"rows": 1024, "k": 256, "n": 256, "groups": 64}
VARY = {"rows": 64, "k": 32, "n": 32, "groups": 1}
CASES = [
    Shape("fwd+bwd", FEW, VARY),
    Shape("fwd+bwd", MANY, VARY),
    Shape("fwd+bwd", FEW, {}, peer="tokamax"),
    Shape("fwd+bwd", MANY, {}, peer="tokamax"),
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Rows, matrices and the sizes of the groups, drawn as a router without preference would."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((c["rows"], c["k"]), np.float32)
    matrices = rng.standard_normal((c["groups"], c["k"], c["n"]), np.float32)
    sizes = rng.multinomial(c["rows"], np.ones(c["groups"]) / c["groups"])
    return rows, matrices, sizes.astype(np.int32)


def ours(_: dict[str, Any]) -> Any:
    """Our grouped product."""
    from dovetail_kernels import ragged_dot

    return gradients(ragged_dot, (0, 1))


def jax_peer(_: dict[str, Any]) -> tuple[str, Any]:
    """jax.lax's grouped product."""
    import jax

    return f"jax.lax {jax.__version__}", gradients(jax.lax.ragged_dot, (0, 1))


def tokamax_peer(_: dict[str, Any]) -> tuple[str, Any]:
    """tokamax's grouped product."""
    import tokamax

    return f"tokamax {tokamax.__version__}", gradients(tokamax.ragged_dot, (0, 1))
