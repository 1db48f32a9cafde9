"""The gated delta rule against the plain scan over tokens, and with its convolution against tokamax's operation."""

from typing import Any

from kernel_cases.shape import Shape, gradients

BASE = {"batch": 1, "time": 1024, "key_heads": 2, "heads": 4, "key_dim": 64, "value_dim": 64, "layer": 0}
VARY = {"time": 128, "key_dim": 16, "value_dim": 16}
CASES = [
    Shape("fwd+bwd", BASE, VARY, inner=5),
    Shape("convolution and rule, forward", {**BASE, "layer": 1}, {}, peer="tokamax", inner=20),
]


def operands(c: dict[str, Any]) -> tuple[Any, ...]:
    """Queries, keys, values, decays and strengths; or a layer's projections, taps, rates and biases."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens, keys = (c["batch"], c["time"]), (c["key_heads"], c["key_dim"])
    q, k = (rng.standard_normal((*tokens, *keys), np.float32) for _ in range(2))
    v = rng.standard_normal((*tokens, c["heads"], c["value_dim"]), np.float32)
    decay, beta = (rng.standard_normal((*tokens, c["heads"]), np.float32) for _ in range(2))
    if not c["layer"]:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        return q, k, v, -np.exp(decay - 2), 1 / (1 + np.exp(-beta))
    mixed = np.concatenate([x.reshape(c["time"], -1) for x in (q, k, v)], axis=-1)
    taps = rng.standard_normal((mixed.shape[-1], 4), np.float32)
    rates, bias = (rng.standard_normal(c["heads"], np.float32) for _ in range(2))
    return mixed, beta[0], decay[0], taps, rates, bias


def ours(c: dict[str, Any]) -> Any:
    """The rule in chunks."""
    import jax
    import jax.numpy as jnp

    from dovetail_kernels import causal_conv1d, gated_delta_rule

    if not c["layer"]:
        return gradients(lambda *tokens: gated_delta_rule(*tokens)[0], (0, 1, 2, 3, 4))

    def split(x: Any, heads: int) -> Any:
        return x.reshape(1, c["time"], heads, -1)

    def unit(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)

    def layer(mixed: Any, b: Any, a: Any, taps: Any, rates: Any, bias: Any) -> Any:
        out, before = causal_conv1d(mixed[None], taps, activation="silu")
        keys = c["key_heads"] * c["key_dim"]
        q, k, v = out[..., :keys], out[..., keys : 2 * keys], out[..., 2 * keys :]
        q, k = (unit(split(x, c["key_heads"])) for x in (q, k))
        decay = -jnp.exp(rates) * jax.nn.softplus(a + bias)
        found, state = gated_delta_rule(q, k, split(v, c["heads"]), decay[None], jax.nn.sigmoid(b)[None])
        return found.reshape(c["time"], -1), state[0], before[0]

    return layer


def jax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """`jax.lax.scan` over tokens."""
    import jax
    import jax.numpy as jnp

    group, scale = c["heads"] // c["key_heads"], c["key_dim"] ** -0.5

    def step(state: Any, now: Any) -> Any:
        q, k, v, decay, beta = now
        q, k = (jnp.repeat(x, group, axis=1) for x in (q, k))
        state = state * jnp.exp(decay)[..., None, None]
        wrong = (v - jnp.einsum("bhkv,bhk->bhv", state, k)) * beta[..., None]
        state = state + jnp.einsum("bhk,bhv->bhkv", k, wrong)
        return state, jnp.einsum("bhkv,bhk->bhv", state, q * scale)

    def call(*tokens: Any) -> Any:
        start = jnp.zeros((c["batch"], c["heads"], c["key_dim"], c["value_dim"]))
        _, found = jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
        return jnp.moveaxis(found, 0, 1)

    return f"jax.lax.scan {jax.__version__}", gradients(call, (0, 1, 2, 3, 4))


def tokamax_peer(c: dict[str, Any]) -> tuple[str, Any]:
    """tokamax's fused operation for serving, with one sequence."""
    import jax.numpy as jnp
    import tokamax
    from tokamax._src.ops.causal_conv1d_gated_delta_rule import api

    sizes = {"n_kq": c["key_heads"], "n_v": c["heads"], "d_k": c["key_dim"], "d_v": c["value_dim"]}
    time, heads = c["time"], c["heads"]

    def layer(mixed: Any, b: Any, a: Any, taps: Any, rates: Any, bias: Any) -> Any:
        (before, state), out = api.IMPLEMENTATIONS["xla"](
            mixed,
            b,
            a,
            jnp.zeros((2, 3, mixed.shape[-1])),
            jnp.zeros((2, heads, c["key_dim"], c["value_dim"])),
            taps[:, None, :],
            None,
            rates,
            bias,
            jnp.array([0, time], jnp.int32),
            jnp.array([1], jnp.int32),
            jnp.array([0, 1, 1], jnp.int32),
            jnp.array([time], jnp.int32),
            kernel_size=4,
            **sizes,
        )
        return out.reshape(time, -1), state[1], before[1]

    return f"tokamax {tokamax.__version__}", layer
