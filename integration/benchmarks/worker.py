"""The child process of one contestant: ``python worker.py FILE SYSTEM``, JSON lines on stdin and stdout.

    {"do": "prepare", "config": ...}  ->  {"name": ...}
    {"do": "run", "n": 3}             ->  {"seconds": 0.2 (of all n), "checksum": [...], "memory": MB, "extra": {...}}
    {"do": "quit"}                    ->  the process ends

What the system prints goes to stderr. An exception ends the process with its traceback there.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def load(path: str) -> Any:
    """Import a benchmark file by its path."""
    sys.path.insert(0, str(Path(__file__).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def anonymous_memory(process: int | str = "self") -> float:
    """MB of anonymous memory of a process; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon")), 0.0)


def run(system: Any, count: int) -> dict[str, Any]:
    """Time `count` iterations and tell what they gave."""
    clock = getattr(system, "clock", time.perf_counter)
    start = clock()
    for _ in range(count):
        system.run()
    seconds = clock() - start
    memory = system.memory() if hasattr(system, "memory") else anonymous_memory()
    extra = system.extra() if hasattr(system, "extra") else {}
    return {"seconds": seconds, "checksum": system.checksum(), "memory": memory, "extra": extra}


def die_with_parent() -> None:
    """Have Linux end this process with the harness: a stopped process would not notice its end."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def main(path: str, name: str) -> None:
    """Answer requests until told to quit or until stdin ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    system: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        if request["do"] == "prepare":
            system = getattr(load(path), name)(request["config"])
            answer = {"name": getattr(system, "name", name)}
        else:
            answer = run(system, request["n"])
        print(json.dumps(answer, default=float), file=answers)  # arrays of one number are numbers


if __name__ == "__main__":
    main(*sys.argv[1:])
