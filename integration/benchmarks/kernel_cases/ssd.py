"""The Mamba-2 recurrence, forward and backward, against the plain scan over tokens."""

from typing import Any

from kernel_cases.shape import Shape, gradients

BASE = {"batch": 1, "time": 1024, "heads": 8, "dim": 64, "groups": 1, "size": 64, "segments": 1}
VARY = {"time": 128, "dim": 16, "size": 16}
CASES = [
    Shape("fwd+bwd", BASE, VARY),
    Shape("packed fwd+bwd", {**BASE, "segments": 5}, VARY),
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Inputs, steps, rates, input and output directions, segment ids."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = (c["batch"], c["time"])
    x = rng.standard_normal((*tokens, c["heads"], c["dim"]), np.float32)
    steps = np.log1p(np.exp(rng.standard_normal((*tokens, c["heads"]), np.float32) - 2))
    rates = -np.exp(rng.standard_normal(c["heads"], np.float32))
    b, out = (rng.standard_normal((*tokens, c["groups"], c["size"]), np.float32) for _ in range(2))
    ids = np.broadcast_to(1 + np.arange(c["time"]) * c["segments"] // c["time"], tokens)
    return x, steps, rates, b, out, ids.astype(np.int32)


def ours(c: dict[str, Any]) -> Any:
    """The recurrence in chunks."""
    from dovetail_kernels import ssd

    def call(x: Any, dt: Any, a: Any, b: Any, out: Any, ids: Any) -> Any:
        return ssd(x, dt, a, b, out, segment_ids=ids if c["segments"] > 1 else None)[0]

    return gradients(call, (0, 1, 2, 3, 4))


def jax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """`jax.lax.scan` over tokens."""
    import jax
    import jax.numpy as jnp

    group = c["heads"] // c["groups"]

    def step(a: Any, state: Any, now: Any) -> Any:
        x, dt, b, out, fresh = now
        b, out = (jnp.repeat(part, group, axis=1) for part in (b, out))
        state = jnp.where(fresh[:, None, None, None], 0, state * jnp.exp(dt * a)[..., None, None])
        state = state + jnp.einsum("bh,bhp,bhn->bhpn", dt, x, b)
        return state, jnp.einsum("bhpn,bhn->bhp", state, out)

    def call(x: Any, dt: Any, a: Any, b: Any, out: Any, ids: Any) -> Any:
        fresh = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
        start = jnp.zeros((c["batch"], c["heads"], c["dim"], c["size"]))
        tokens = [jnp.moveaxis(part, 1, 0) for part in (x, dt, b, out, fresh)]
        _, found = jax.lax.scan(lambda state, now: step(a, state, now), start, tuple(tokens))
        return jnp.moveaxis(found, 0, 1)

    return f"jax.lax.scan {jax.__version__}", gradients(call, (0, 1, 2, 3, 4))
