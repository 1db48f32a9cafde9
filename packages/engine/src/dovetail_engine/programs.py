"""Programs: everything that an engine runs, compiled ahead for a lattice of shapes.

A shape that was not compiled is an error, never a stall. Sizes between two buckets are padded to the larger one.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

__all__ = ["Compiled", "Programs", "ShapeError", "bucket", "buckets", "check_maps", "compilation_cache"]

_LOG = logging.getLogger("dovetail_engine")


class ShapeError(RuntimeError):
    """A step has a shape that no program was compiled for."""


def buckets(least: int, most: int, factor: int = 2) -> tuple[int, ...]:
    """Return sizes from `least` up, each `factor` times the one before, and `most`.

    >>> buckets(16, 100)
    (16, 32, 64, 100)
    """
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(min(sizes[-1] * factor, most))
    return tuple(sizes)


def bucket(size: int, sizes: Sequence[int]) -> int:
    """Return the smallest of `sizes` that is at least `size`.

    Raises:
        ShapeError: all are smaller.

    >>> bucket(17, (16, 32))
    32
    """
    for candidate in sizes:
        if candidate >= size:
            return candidate
    raise ShapeError(f"size {size}; the largest that was compiled is {sizes[-1]}")


class Compiled(NamedTuple):
    """One compiled program and what it cost.

    Attributes:
        call: runs it.
        seconds: it took to trace and compile (or to load from the compilation cache).
        flops: floating-point operations as XLA counts them; a loop's body counts once.
        memory: bytes of temporary memory.
    """

    call: Any
    seconds: float
    flops: float
    memory: int


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled programs by key, such as ``("decode", 8, 256)``."""

    table: dict[tuple[Any, ...], Compiled]

    @classmethod
    def compile(cls, lower: Callable[..., Any], keys: Iterable[tuple[Any, ...]]) -> "Programs":
        """Compile ``lower(*key)`` for every key, with as many threads as there are processors.

        Raises:
            RuntimeError: Linux will soon refuse this process more memory maps, and a compiler without them dies.
        """

        def one(key: tuple[Any, ...]) -> Compiled:
            check_maps()
            begin = time.perf_counter()
            compiled = lower(*key).compile()
            seconds = time.perf_counter() - begin
            _LOG.debug("compiled %s in %.2f s", key, seconds)
            cost = compiled.cost_analysis() or {}
            memory = compiled.memory_analysis()
            return Compiled(compiled, seconds, cost.get("flops", 0.0), int(getattr(memory, "temp_size_in_bytes", 0)))

        keys = list(keys)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return cls(dict(zip(keys, pool.map(one, keys), strict=True)))

    def __call__(self, key: tuple[Any, ...], *args: Any) -> Any:
        """Run a program.

        Raises:
            ShapeError: there is no program of this key.
        """
        found = self.table.get(key)
        if found is None:
            raise ShapeError(f"no program {key} was compiled; there are {sorted(map(str, self.table))}")
        return found.call(*args)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Iterate over the keys."""
        return iter(self.table)

    def report(self) -> str:
        """Return a table of all programs: seconds to compile, floating-point operations, temporary memory."""
        lines = [f"{'program':<28}{'seconds':>9}{'MFLOP':>10}{'MB':>8}"]
        for key, entry in self.table.items():
            name = " ".join(str(part) for part in key)
            lines.append(f"{name:<28}{entry.seconds:>9.2f}{entry.flops / 1e6:>10.1f}{entry.memory / 1e6:>8.1f}")
        return "\n".join(lines)


def check_maps(
    maps: Path = Path("/proc/self/maps"), limit: Path = Path("/proc/sys/vm/max_map_count"), share: float = 0.9
) -> None:
    """Raise where a process is near its limit of memory maps; for a CPU, XLA makes three for each kernel.

    Raises:
        RuntimeError: the process has more than `share` of the maps that it may have.
    """
    try:
        most = int(limit.read_text())
        with maps.open("rb") as lines:
            count = sum(1 for _ in lines)
    except OSError:  # no Linux
        return
    if count > share * most:
        raise RuntimeError(
            f"{count} memory maps, and Linux allows {most}; an engine whose programs are many or long needs more: "
            f"sysctl vm.max_map_count={4 * most}, or a smaller max_length or max_running"
        )


def compilation_cache(directory: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a directory, for this process and later ones: a second start compiles nothing.

    This sets jax's persistent compilation cache for the whole process; call it before anything is compiled.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
