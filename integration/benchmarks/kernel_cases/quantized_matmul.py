"""Products with quantized weights against dequantizing them and a product of floats, forward."""

from typing import Any

from kernel_cases.shape import Shape

BASE = {"tokens": 8, "inner": 1024, "outer": 1024, "bits": 8, "group": 1024, "integers": 0}
VARY = {"outer": 64}
CASES = [
    Shape("int8", BASE, VARY, inner=20),
    Shape("int8, one token", {**BASE, "tokens": 1}, {}, inner=20),
    Shape("int8, large", {**BASE, "inner": 4096, "outer": 4096, "group": 4096}, VARY, inner=5),
    Shape("int4 in groups, large", {**BASE, "inner": 4096, "outer": 4096, "bits": 4, "group": 128}, VARY, inner=5),
    Shape("int4 in groups", {**BASE, "bits": 4, "group": 128}, VARY, inner=10),
    Shape("int8 x int8", {**BASE, "integers": 1}, VARY, inner=50),
    Shape("int8 x int8, many tokens", {**BASE, "tokens": 128, "integers": 1}, VARY, inner=20),
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Activations that int8 holds exactly where they are rounded, whole numbers, scales."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((c["tokens"], c["inner"]), np.float32)
    if c["integers"]:
        x = rng.integers(-127, 128, x.shape).astype(np.float32)
        x[:, 0] = 127
    most = 2 ** (c["bits"] - 1) - 1
    q = rng.integers(-most, most + 1, (c["inner"], c["outer"])).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, (c["inner"] // c["group"], c["outer"])).astype(np.float32)
    return x, q, scale


def ours(c: dict[str, Any]) -> Any:
    """The product in blocks, or of integers."""
    import jax.numpy as jnp

    from dovetail_kernels import quantized_matmul
    from dovetail_protocols import QuantizedArray

    def call(x: Any, q: Any, scale: Any) -> Any:
        w = QuantizedArray(q.astype(jnp.int4) if c["bits"] == 4 else q, scale)
        return quantized_matmul(x, w, activations="int8" if c["integers"] else None)

    return call


def jax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """Dequantize, then one product."""
    import jax
    import jax.numpy as jnp

    def call(x: Any, q: Any, scale: Any) -> Any:
        q = q.astype(jnp.int4) if c["bits"] == 4 else q
        return x @ (q.astype(jnp.float32) * jnp.repeat(scale, c["group"], axis=0))

    return f"jax.numpy {jax.__version__}", call
