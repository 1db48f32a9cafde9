"""A large float32 matrix product in jax and in torch: what both get out of the machine, and a test of the harness."""

import random
from typing import Any

from protocol import Benchmark, Case, Contestant, nearby

SIZES = {"m": 2048, "k": 2048, "n": 2048}


class Jax:
    """jax.numpy's matrix product under jit."""

    def __init__(self, config: dict[str, Any]) -> None:
        import jax
        import jax.numpy as jnp

        self.name = f"jax {jax.__version__}"
        a, b = operands(config)
        self.a, self.b = jnp.asarray(a), jnp.asarray(b)
        self.product = jax.jit(jnp.matmul).lower(self.a, self.b).compile()
        self.run()

    def run(self) -> None:
        """One product."""
        self.out = self.product(self.a, self.b).block_until_ready()

    def checksum(self) -> list[float]:
        """Some elements."""
        return corners(self.out)


class Torch:
    """torch's matrix product."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch

        self.name = f"torch {torch.__version__}"
        self.matmul = torch.matmul
        self.a, self.b = (torch.from_numpy(x) for x in operands(config))
        self.run()

    def run(self) -> None:
        """One product."""
        self.out = self.matmul(self.a, self.b)

    def checksum(self) -> list[float]:
        """Some elements."""
        return corners(self.out)


def operands(config: dict[str, Any]) -> tuple[Any, Any]:
    """The same random matrices in every environment."""
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = ((config["m"], config["k"]), (config["k"], config["n"]))
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def corners(product: Any) -> list[float]:
    """Eight elements along the diagonal."""
    step = max(1, min(product.shape) // 8)
    return [float(product[i, i]) for i in range(0, min(product.shape), step)][:8]


def cases(rng: random.Random | None) -> list[Case]:
    """2048^3 and, with a generator, three sizes near it."""
    configs = [SIZES, *(nearby(rng, SIZES, dict.fromkeys(SIZES, 32)) for _ in range(3 if rng else 0))]
    return [Case("{m}x{k}x{n} float32".format(**config), config, tolerance=1e-4, inner=3) for config in configs]


BENCHMARK = Benchmark("matmul", Contestant("Jax", "ours"), Contestant("Torch", "torch"), cases)
