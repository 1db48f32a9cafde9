"""Memory: what a compiled program will need, and what this process holds."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Memory", "ProcessMemory", "memory", "process_memory"]


@dataclass(frozen=True)
class Memory:
    """Bytes of a compiled program on each device, as XLA planned them.

    Attributes:
        arguments: inputs.
        outputs: results.
        aliased: the part of the outputs that reuses donated inputs.
        temporaries: intermediate buffers.
        code: the program itself (0 where the backend does not say).
        peak: the highest use at any time by XLA's own reckoning; None where it does not say.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None

    @property
    def total(self) -> int:
        """Everything that exists at once: arguments, outputs that are not aliased, temporaries and code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def memory(compiled: Any) -> Memory:
    """Return the memory plan of ``jax.jit(f).lower(...).compile()``, before anything runs.

    Raises:
        TypeError: `compiled` is not a compiled program.
        ValueError: the backend gives no plan.

    >>> import jax, jax.numpy as jnp
    >>> memory(jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()).arguments
    16384
    """
    if not hasattr(compiled, "memory_analysis"):
        raise TypeError(f"memory() got {type(compiled).__name__}; pass jax.jit(f).lower(...).compile()")
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend gives no memory plan for its compiled programs")
    peak = getattr(stats, "peak_memory_in_bytes", None)
    return Memory(
        int(stats.argument_size_in_bytes),
        int(stats.output_size_in_bytes),
        int(stats.alias_size_in_bytes),
        int(stats.temp_size_in_bytes),
        int(stats.generated_code_size_in_bytes),
        int(peak) if peak else None,
    )


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of this process; None where the system does not tell.

    Attributes:
        rss: resident now.
        anonymous: the part of it that is no file mapping: allocations of Python, NumPy and XLA.
        peak_rss: the highest `rss` so far.
    """

    rss: int | None
    anonymous: int | None
    peak_rss: int | None


def process_memory() -> ProcessMemory:
    """Return the memory of this process from ``/proc/self/status``, or from ``getrusage`` where there is no ``/proc``.

    >>> process_memory().peak_rss > 0
    True
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return _from_getrusage()
    lines = (line.split(":", 1) for line in status.read_text().splitlines() if line.endswith(" kB"))
    kilobytes = {name: int(value.split()[0]) for name, value in lines}
    found = (kilobytes.get(name) for name in ("VmRSS", "RssAnon", "VmHWM"))
    return ProcessMemory(*(None if value is None else 1024 * value for value in found))


def _from_getrusage() -> ProcessMemory:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return ProcessMemory(None, None, unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
