"""A block of experts, forward and backward: ours against the same block on `jax.lax.ragged_dot`, and over the number of
experts. float32; gradients of the router, the experts and the tokens.

The curve keeps tokens, choices and widths, hence operations, and has 64 rows per expert or more: its peer is the block
with 4 experts. What an optimizer takes grows with the experts' weights and stands apart.
"""

import random
import statistics
import time
from typing import Any

from kernels import System
from protocol import Benchmark, Case, Contestant, nearby

BLOCK = {"experts": 16, "top_k": 2, "tokens": 1024, "features": 128, "hidden": 256}
CURVE = {**BLOCK, "tokens": 2048}
FEWEST = 4


def weights(c: dict[str, Any]) -> dict[str, Any]:
    """Router and experts."""
    import numpy as np

    rng = np.random.default_rng(0)
    e, d, f = c["experts"], c["features"], c["hidden"]
    shapes = {"router": (d, e), "gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)}
    return {name: rng.standard_normal(s, np.float32) * s[-2] ** -0.5 for name, s in shapes.items()}


class Block(System):
    """One compiled forward and backward."""

    def __init__(self, c: dict[str, Any]) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        x = np.random.default_rng(1).standard_normal((c["tokens"], c["features"]), np.float32)
        self.config = c
        self.operands = jax.tree.map(jnp.asarray, (weights(c), x))
        self.name, function = self.block(c)

        def both(params: Any, x: Any) -> Any:
            out, pull = jax.vjp(function, params, x)
            return out, pull(out)

        self.compiled = jax.jit(both).lower(*self.operands).compile()
        self.run()

    def block(self, c: dict[str, Any]) -> tuple[str, Any]:
        """The name and ``function(params, x)``."""
        raise NotImplementedError

    def extra(self) -> dict[str, float]:
        """Milliseconds that AdamW takes for the same weights."""
        import jax
        import optax

        optimizer = optax.adamw(1e-3)
        params, gradients = jax.tree.map(jax.numpy.copy, self.operands[0]), self.out[1][0]
        state = optimizer.init(params)

        def update(params: Any, state: Any, gradients: Any) -> Any:
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        step, times = jax.jit(update, donate_argnums=(0, 1)), list[float]()
        for _ in range(8):
            started = time.perf_counter()
            params, state = jax.block_until_ready(step(params, state, gradients))
            times.append(1e3 * (time.perf_counter() - started))
        return {"adamw_ms": round(statistics.median(times[2:]), 2)}


class Ours(Block):
    """dovetail-models, as it chooses itself."""

    def block(self, c: dict[str, Any]) -> tuple[str, Any]:
        from flax import nnx

        from dovetail_kernels import DenseMixer
        from dovetail_models import Experts, Router, Selection, SparseMLP, abstract, merge

        given: dict[str, Any] = {"init": nnx.initializers.zeros, "dtype": "float32"}

        def build() -> Any:
            rngs, select = nnx.Rngs(0), Selection(experts=c["experts"], top_k=c["top_k"])
            out = {"out_init": given["init"]}
            experts = Experts(c["features"], c["hidden"], c["experts"], rngs=rngs, **given, **out)
            return SparseMLP(Router(c["features"], select, rngs=rngs, **given), experts)

        definition, _ = abstract(build)

        def call(params: Any, x: Any) -> Any:
            tree = {"router": {"weight": params["router"]}, "experts": {n: params[n] for n in ("gate", "up", "down")}}
            return merge(definition, tree)(0, x, DenseMixer(None, 1, c["tokens"]))[0]

        return f"{c['experts']} experts", call


class Fewest(Ours):
    """Ours with the fewest experts."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__({**c, "experts": FEWEST})


class Ragged(Block):
    """What one writes with jax alone."""

    def block(self, c: dict[str, Any]) -> tuple[str, Any]:
        import jax
        import jax.numpy as jnp

        k, experts = c["top_k"], c["experts"]

        def call(params: Any, x: Any) -> Any:
            scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), k)
            share = scores / jnp.sum(scores, axis=1, keepdims=True)
            order = jnp.argsort(chosen.reshape(-1))
            rows, sizes = x[order // k], jnp.bincount(chosen.reshape(-1), length=experts)
            gate, up = (jax.lax.ragged_dot(rows, params[name], sizes) for name in ("gate", "up"))
            y = jax.lax.ragged_dot(jax.nn.silu(gate) * up, params["down"], sizes)
            return jnp.zeros_like(x).at[order // k].add(y * share.reshape(-1)[order][:, None])

        return f"jax.lax {jax.__version__}", call


def cases(rng: random.Random | None) -> list[Case]:
    """The block and three near it, and the curve."""
    vary = {"tokens": 64, "features": 16, "hidden": 32}
    configs = [BLOCK, *(nearby(rng, BLOCK, vary) for _ in range(3 if rng else 0))]
    blocks = [Case("block " + _sizes(c), c, 1e-3) for c in configs]
    curve = [{**CURVE, "experts": FEWEST * 2**n} for n in range(1, 5)]
    pair = Contestant("Ours", "ours"), Contestant("Fewest", "ours")
    return blocks + [Case("curve " + _sizes(c), c, pair=pair, agreement=lambda *_: None) for c in curve]


def _sizes(c: dict[str, Any]) -> str:
    return "E{experts} k{top_k} T{tokens} D{features} F{hidden}".format(**c)


BENCHMARK = Benchmark("moe", Contestant("Ours", "ours"), Contestant("Ragged", "ours"), cases)
