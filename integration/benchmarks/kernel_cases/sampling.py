"""Sampling with top-k and top-p against a program that sorts every row."""

from typing import Any

from kernel_cases.shape import Shape

BASE = {"rows": 16, "vocab": 151936, "top_k": 50}
CASES = [Shape("top-k top-p", BASE, {"rows": 1, "vocab": 1, "top_k": 1}, inner=1)]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Logits."""
    import numpy as np

    return (np.random.default_rng(0).standard_normal((c["rows"], c["vocab"]), np.float32) * 3,)


def ours(c: dict[str, Any]) -> Any:
    """Our sampler."""
    import jax.numpy as jnp

    from dovetail_kernels import Sampling, sample

    how = Sampling(
        jnp.full(c["rows"], 0.8),
        jnp.full(c["rows"], c["top_k"]),
        jnp.full(c["rows"], 0.95),
        jnp.zeros(c["rows"]),
        jnp.arange(c["rows"], dtype=jnp.uint32),
        jnp.zeros(c["rows"], jnp.int32),
    )
    return lambda logits: sample(logits, how)


def jax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """Filters from sorted logits, then `jax.random.categorical` with the same seeds."""
    import jax
    import jax.numpy as jnp

    def draw(row: Any, seed: Any) -> Any:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), 0), row)

    def call(logits: Any) -> Any:
        scaled = logits / 0.8
        best = -jnp.sort(-scaled, axis=-1)
        best = jnp.where(jnp.arange(c["vocab"]) < c["top_k"], best, -jnp.inf)
        mass = jax.nn.softmax(best, axis=-1)
        inside = jnp.cumsum(mass, axis=-1) - mass < 0.95
        lowest = jnp.min(jnp.where(inside, best, jnp.inf), axis=-1, keepdims=True)
        seeds = jnp.arange(c["rows"], dtype=jnp.uint32)
        return jax.vmap(draw)(jnp.where(scaled >= lowest, scaled, -jnp.inf), seeds).astype(jnp.int32)

    return f"jax.numpy.sort {jax.__version__}", call
