"""``dovetail doctor``: does this machine work, and what will it run on."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

__all__ = ["Doctor"]


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show devices, versions, caches and threads, and run one computation on every device."""

    def run(self) -> int:
        """Print the findings; the status is 1 when a device computes wrong numbers or versions do not fit."""
        from dovetail.versions import Version

        status = Version().run()
        print("threads")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        print(f"  usable cores             {cores} of {os.cpu_count()}")
        for name in ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR"):
            print(f"  {name:24} {os.environ.get(name, 'not set')}")
        print("devices")
        broken = _devices()
        print("caches and space")
        for label, path in _places():
            print(f"  {label:24} {path} ({shutil.disk_usage(_existing(path)).free / 2**30:.1f} GiB free)")
        return 1 if broken or status else 0


def _devices() -> bool:
    import jax
    import jax.numpy as jnp

    broken = False
    for device in jax.devices():
        x = jax.device_put(jnp.arange(1 << 16, dtype=jnp.float32).reshape(256, 256) % 7, device)
        started = time.perf_counter()
        right = float(jnp.sum(x @ x)) == float(jnp.sum(jnp.sum(x, 0) * jnp.sum(x, 1)))
        broken |= not right
        state = "ok" if right else "WRONG RESULT"
        print(f"  {device!s:24} {device.device_kind}, {state}, first use {time.perf_counter() - started:.2f} s")
    print(f"  processes                {jax.process_index() + 1} of {jax.process_count()}")
    return broken


def _places() -> list[tuple[str, Path]]:
    import jax

    cache = jax.config.values.get("jax_compilation_cache_dir")
    places = [("working directory", Path.cwd())]
    return [*places, ("compilation cache", Path(cache))] if cache else places


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())
