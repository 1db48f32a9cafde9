"""Models: importing 1 GB of weights from a Hugging Face directory, against transformers; steps of deep ones (`depth`).

The directory is made here, once. Each turn imports it in a process of its own that has imported its libraries and
allocates memory as a user's would; the time ends when every value of every parameter was read once, since a memory map
alone is no import. Memory is the largest anonymous memory of that process, libraries included; next to it stands what
it may be: the weights, 1.3 times the largest tensor and 150 MB. Files begin as transformers writes them; those of
the mapped case as `dovetail models convert` does.
"""

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import depth
import llama
from depth import Compile, ScannedCompile, ScannedStep, Step  # noqa: F401 - the harness looks for them here
from protocol import Benchmark, Case, Contestant, nearby
from train import Transformers as Eager  # noqa: F401 - and for this one
from worker import anonymous_memory

FOLDER = Path(__file__).resolve().parents[2] / ".nox" / "bench-models"
IMPORT = {"d": 2048, "layers": 3, "heads": 16, "kv_heads": 8, "ff": 5504, "vocab": 32000, "time": 4096}
SHARD = 300_000_000


def checkpoint(c: dict[str, Any]) -> Path:
    """Write a sharded directory with random weights, unless it is there."""
    recipe = hashlib.sha256(json.dumps(c).encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    folder = FOLDER / recipe
    if folder.exists():
        return folder
    shutil.rmtree(FOLDER, ignore_errors=True)
    partial = FOLDER / "partial"
    partial.mkdir(parents=True)
    shapes, owners = llama.shapes(c), {}
    stored = c.get("stored", "F32")
    for number, names in enumerate(shards(shapes)):
        file = f"model-{number:05}.safetensors"
        tensors = {name: values(number, shapes[name], stored) for name in names}
        llama.write_tensors(partial / file, tensors, stored, 64 if c.get("mapped") else 8)
        owners |= dict.fromkeys(names, file)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    (partial / "config.json").write_text(
        json.dumps({**llama.hf_config(c), "dtype": {"F32": "float32", "BF16": "bfloat16"}[stored]})
    )
    partial.rename(folder)
    return folder


def shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The names of each file."""
    found: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += 4 * math.prod(shape)
        if found[-1] and size > SHARD:
            found.append([])
            size = 4 * math.prod(shape)
        found[-1].append(name)
    return found


def values(seed: int, shape: tuple[int, ...], stored: str) -> Any:
    """Random weights; those of 16 bits are the upper halves of float32."""
    import numpy as np

    wide = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)
    return wide if stored == "F32" else (wide.view(np.uint32) >> 16).astype(np.uint16)


class Import:
    """A worker whose turns are those of a child; the next child gets ready after the turn."""

    program = ""

    def __init__(self, c: dict[str, Any]) -> None:
        self.folder, self.config = checkpoint(c), c
        self.child = self._started()
        self.name = self.child.readline()["name"]

    def _started(self) -> "Child":
        return Child(type(self).__name__, self.folder)

    def run(self) -> None:
        """Import it and read every value."""
        self.child.go()
        self.result = self.child.readline()

    def checksum(self) -> list[float]:
        """The sum of all squares."""
        return [self.result["squares"]]

    def memory(self) -> float:
        """The largest anonymous memory of the child, in MB."""
        self.child.end()
        self.child = self._started()
        self.child.readline()
        return self.result["peak"]

    def extra(self) -> dict[str, float]:
        """What the peak may be, and what it is without the libraries; the seconds until the model is there."""
        sizes = [4e-6 * math.prod(shape) for shape in llama.shapes(self.config).values()]
        allowed = sum(sizes) + 1.3 * max(sizes) + 150
        found = {"allowed_MB": allowed, "libraries_MB": self.result["before"], "loaded_ms": self.result["loaded"]}
        return {name: round(value) for name, value in found.items()}


class Child:
    """A process that imports one directory when it is told to."""

    def __init__(self, system: str, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, __file__, system, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept)

    def go(self) -> None:
        """Let it begin."""
        print("go", file=self.process.stdin, flush=True)

    def readline(self) -> dict[str, Any]:
        """Return its next answer."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the child ended with exit code {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        """Wait for its end."""
        self.process.communicate()


class Dovetail(Import):
    """`dovetail_models.from_pretrained`."""

    options: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def ready(cls) -> tuple[str, Callable[[Path], Iterable[Any]]]:
        """Return a name and what imports."""
        import jax
        import numpy as np

        from dovetail_models import from_pretrained, split

        def load(folder: Path) -> Iterable[Any]:
            return map(np.from_dlpack, jax.tree.leaves(split(from_pretrained(folder, **cls.options))[1]))

        return f"dovetail, jax {jax.__version__}", load


class Mapped(Dovetail):
    """The same, of weights that stay in the files."""

    options: ClassVar = {"mapped": True}


class Transformers(Import):
    """``AutoModelForCausalLM.from_pretrained``, which leaves tensors in the files."""

    own: ClassVar = False

    @classmethod
    def ready(cls) -> tuple[str, Callable[[Path], Iterable[Any]]]:
        """Return a name and what imports."""
        import torch
        import transformers

        kind = transformers.LlamaForCausalLM  # its module is imported here

        def load(folder: Path) -> Iterable[Any]:
            model = kind.from_pretrained(folder, dtype=torch.float32)
            tensors = [parameter.detach() for parameter in model.parameters()]
            return [(tensor.clone() if cls.own else tensor).numpy() for tensor in tensors]

        return f"transformers {transformers.__version__}, torch {torch.__version__}", load


class Cloned(Transformers):
    """The same, with tensors of its own."""

    own = True


def child(system: str, folder: str) -> None:
    """Get ready, say so, wait, import, and tell what it took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, load = globals()[system].ready()
    print(json.dumps({"name": name}), file=answers)
    sys.stdin.readline()
    before, peak, over = anonymous_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    arrays = list(load(Path(folder)))
    loaded = 1e3 * (time.perf_counter() - started)
    squares = sum(float((flat := array.ravel("K")) @ flat) for array in arrays)
    over.set()
    watcher.join()
    result = {"squares": squares, "before": before, "peak": max(peak[0], anonymous_memory()), "loaded": loaded}
    print(json.dumps(result), file=answers)


def import_cases(rng: random.Random | None) -> list[Case]:
    """Weights of 1 GB: as stored, mapped, copied by both, out of bfloat16; with a generator three near each."""
    steps = {"d": 256, "ff": 64, "layers": 1, "vocab": 64}
    kinds = [IMPORT, {**IMPORT, "mapped": True}, {**IMPORT, "own": True}, {**IMPORT, "stored": "BF16"}]
    return [
        import_case(c) for kind in kinds for c in [kind, *(nearby(rng, kind, steps) for _ in range(3 if rng else 0))]
    ]


def import_case(c: dict[str, Any]) -> Case:
    """One import."""
    size = 4e-9 * llama.parameters(c)
    stored = "" if c.get("stored", "F32") == "F32" else " from bfloat16"
    how, pair = "", None
    if c.get("mapped"):
        how, pair = " mapped", (Contestant("Mapped", "ours"), PEER)
    if c.get("own"):
        how, pair = " copied by both", (BENCHMARK.ours, Contestant("Cloned", "torch"))
    name = f"import {size:.2f} GB float32{stored}{how}, Llama d{c['d']} L{c['layers']}"
    return Case(name, c, tolerance=1e-4, pair=pair)


def cases(rng: random.Random | None) -> list[Case]:
    """All parts; a case of another part names its own pair."""
    return [*import_cases(rng), *depth.cases(rng)]


PEER = Contestant("Transformers", "torch")
BENCHMARK = Benchmark("models", Contestant("Dovetail", "ours"), PEER, cases)

if __name__ == "__main__":
    child(*sys.argv[1:])
