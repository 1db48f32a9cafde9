"""Operations of dovetail-kernels against jax's own, optax's and tokamax's, float32, forward and backward.

Each module of `kernel_cases` is one operation:

    CASES = [Shape("causal T2048", {"batch": 1, ...}, {"time": 128}, peer="jax")]   # what to measure, what to vary
    def operands(config) -> tuple of NumPy arrays
    def ours(config) -> function of these          # results are compared: outputs, then gradients
    def jax_peer(config) -> (its name, function)   # for peer="jax"; runs next to ours
    def tokamax_peer(config) -> (its name, function)   # for peer="tokamax"

Memory is that of XLA's temporaries, in MB. `gradients` makes a function with its gradients out of one without.
"""

import importlib
import random
import re
import zlib
from typing import Any

from kernel_cases.shape import MODULES
from protocol import Benchmark, Case, Contestant, nearby


class System:
    """One compiled function of one operation."""

    def __init__(self, config: dict[str, Any]) -> None:
        import jax

        module = importlib.import_module(f"kernel_cases.{config['module']}")
        self.name, function = self.choose(module, config)
        self.operands = [jax.numpy.asarray(x) for x in module.operands(config)]
        self.compiled = jax.jit(function).lower(*self.operands).compile()
        self.run()

    def choose(self, module: Any, config: dict[str, Any]) -> tuple[str, Any]:
        raise NotImplementedError

    def run(self) -> None:
        """One call."""
        import jax

        self.out = jax.block_until_ready(self.compiled(*self.operands))

    def checksum(self) -> list[float]:
        """A random projection of every result, on the scale of its root mean square."""
        import jax
        import numpy as np

        sums = list[float]()
        for leaf in jax.tree.leaves(self.out):
            x = np.asarray(leaf, np.float64).reshape(-1)
            weights = np.random.default_rng(len(sums)).standard_normal(x.size)
            sums.append(float(x @ weights) / np.sqrt(x.size))
        return sums

    def memory(self) -> float:
        """MB of temporaries."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 2**20

    def extra(self) -> dict[str, float]:
        """A number of the compiled instructions and their shapes: where it is the peer's, times differ by chance."""
        instructions = re.findall(r"= (\S+) ([\w-]+)\(", self.compiled.as_text())
        return {"program": zlib.crc32(repr(instructions).encode())}


class Ours(System):
    """dovetail-kernels, as it chooses itself."""

    def choose(self, module: Any, config: dict[str, Any]) -> tuple[str, Any]:
        return "dovetail-kernels", module.ours(config)


class Jax(System):
    """The peer that runs on jax alone, or with optax."""

    def choose(self, module: Any, config: dict[str, Any]) -> tuple[str, Any]:
        return module.jax_peer(config)


class Tokamax(System):
    """tokamax with ``implementation=None``."""

    def choose(self, module: Any, config: dict[str, Any]) -> tuple[str, Any]:
        return module.tokamax_peer(config)


PAIRS = {
    "jax": (Contestant("Ours", "ours"), Contestant("Jax", "ours")),
    "tokamax": (Contestant("Ours", "ours"), Contestant("Tokamax", "tokamax")),
}


def cases(rng: random.Random | None) -> list[Case]:
    """The named shapes of every operation and, with a generator, three near each of those that have a bound."""
    found = list[Case]()
    for name in MODULES:
        for shape in importlib.import_module(f"kernel_cases.{name}").CASES:
            drawn = range(3) if rng and shape.vary else ()
            for config in (shape.config, *(nearby(rng, shape.config, shape.vary) for _ in drawn)):
                sizes = " ".join(f"{key}{value}" for key, value in config.items())
                text = f"{name} {shape.name}: {sizes}"
                full = {"module": name, **config}
                how = {"tolerance": shape.tolerance, "inner": shape.inner, "starts": shape.starts}
                found.append(Case(text, full, pair=PAIRS[shape.peer], **how))
    return found


BENCHMARK = Benchmark("kernels", *PAIRS["jax"], cases)
