"""Compares ours with a peer in one run: ``python integration/benchmarks/harness.py NAME [--json]``.

Each contestant is a worker process in its own environment, stopped (SIGSTOP) while the other has its turn. Turns go
A B A B; after each the two must agree on their checksums. Machines are noisy: only ratios of one run mean something.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from environments import ENVIRONMENTS
from protocol import Benchmark, Case, Contestant
from worker import load

HERE = Path(__file__).resolve().parent
MIN_TURNS = 5


class BenchmarkError(Exception):
    """A case could not be measured: a worker died or hung, or the contestants disagree."""


def environment_variables(threads: int) -> dict[str, str]:
    """What a worker sees: this process's variables, the same number of threads for all, and no busy waiting.

    Memory is as in a process that has run for long: glibc keeps what is freed, but for buffers above 32 MB, the limit
    that its threshold adapts to. Left to adapt, it is there in one process and not in the next, and the same program
    takes 1.0 ms or 4.5 ms, mostly page faults.
    """
    count = str(threads)
    settings = {
        "KMP_BLOCKTIME": "0",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if not Path("/dev/nvidia0").exists():
        settings["JAX_PLATFORMS"] = "cpu"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, **settings}


class Worker:
    """One contestant's process. It is stopped except while it answers."""

    def __init__(self, label: str, command: Sequence[str], threads: int, timeout: float) -> None:
        self.label, self.timeout = label, timeout
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `close`
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment_variables(threads),
            start_new_session=True,
        )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, sorted(os.sched_getaffinity(0))[:threads])
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._signal(signal.SIGSTOP)

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.answers.put(line)
        self.answers.put("")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Let the worker answer one request.

        Raises:
            BenchmarkError: it died, or did not answer in time.
        """
        self._signal(signal.SIGCONT)
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.answers.get(timeout=self.timeout)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            raise BenchmarkError(f"{self.label} gave no answer to {request['do']!r} in {self.timeout:g} s") from None
        if not line:
            raise BenchmarkError(f"{self.label} died of {self._cause()} during {request['do']!r}\n{self._tail()}")
        self._signal(signal.SIGSTOP)
        return json.loads(line)

    def _cause(self) -> str:
        code = self.process.wait(timeout=10)
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _tail(self) -> str:
        self.errors.seek(0)
        return "\n".join(self.errors.read().splitlines()[-15:])

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.errors):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure."""

    turns: int = 7
    threads: int = 2
    timeout: float = 600.0
    seed: int | None = None
    only: str = ""

    def __post_init__(self) -> None:
        if self.turns < MIN_TURNS:
            raise ValueError(f"turns={self.turns}; a median needs at least {MIN_TURNS}")
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}; expected at least 1")


@dataclasses.dataclass
class Score:
    """What one contestant gave: seconds of an iteration in each turn, and its last memory and extra values."""

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    memory: float = 0.0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def _workers(path: str, pair: Sequence[Contestant], options: Options, first: int) -> Iterator[list[Worker]]:
    """The processes of a pair, in its order; the one at `first` is started before the other."""
    workers: list[Worker] = []
    try:
        for contestant in (pair[first], pair[1 - first]):
            python = ENVIRONMENTS[contestant.environment]()
            command = [python, str(HERE / "worker.py"), path, contestant.system]
            workers.append(Worker(contestant.system, command, options.threads, options.timeout))
        yield workers[:: -1 if first else 1]
    finally:
        for worker in workers:
            worker.close()


def measure(path: str, benchmark: Benchmark, case: Case, options: Options) -> list[Score]:
    """Measure one case and return the scores of ours and the peer.

    Raises:
        BenchmarkError: a worker died or hung, or the checksums differ.
    """
    pair = case.pair or (benchmark.ours, benchmark.peer)
    scores = [Score(contestant.system) for contestant in pair]
    for start in range(case.starts):
        with _workers(path, pair, options, start % 2) as workers:
            for score, worker in zip(scores, workers, strict=True):
                score.name = worker.ask(do="prepare", config=case.config)["name"]
            for turn in range(options.turns + 1):
                answers = [worker.ask(do="run", n=case.inner) for worker in workers]
                text = case.disagreement(answers[0]["checksum"], answers[1]["checksum"])
                if text is not None:
                    raise BenchmarkError(f"{scores[0].name} and {scores[1].name} disagree in turn {turn}: {text}")
                for score, answer in zip(scores, answers, strict=True):
                    if turn:  # the first turn warms up
                        score.seconds.append(answer["seconds"] / case.inner)
                    score.memory, score.extra = answer["memory"], answer["extra"]
    return scores


def result(benchmark: Benchmark, case: Case, scores: Sequence[Score]) -> dict[str, Any]:
    """The JSON line of a case; numbers with four significant digits."""
    ours, peer = (case.value(statistics.median(score.seconds)) for score in scores)
    line: dict[str, Any] = {
        "bench": benchmark.name,
        "case": case.name,
        "ours": _short(ours),
        "peer": _short(peer),
        "unit": case.unit,
        "peer_name": scores[1].name,
        "ratio": _short(case.ratio(ours, peer)),
        "ours_memory": _short(scores[0].memory),
        "peer_memory": _short(scores[1].memory),
    }
    extra = {
        f"{who}_{name}": value
        for who, s in zip(("ours", "peer"), scores, strict=True)
        for name, value in s.extra.items()
    }
    return {**line, "extra": extra} if extra else line


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def compare(path: str, options: Options) -> Iterator[dict[str, Any]]:
    """Measure the cases of a benchmark file; a case that fails gives ``{"bench", "case", "error"}``."""
    benchmark: Benchmark = load(path).BENCHMARK
    rng = None if options.seed is None else random.Random(options.seed)
    for case in benchmark.cases(rng):
        if options.only not in case.name:
            continue
        try:
            yield result(benchmark, case, measure(path, benchmark, case, options))
        except BenchmarkError as error:
            yield {"bench": benchmark.name, "case": case.name, "error": str(error)}


def row(line: Mapping[str, Any]) -> str:
    """A line of the table."""
    if "error" in line:
        return f"{line['case']:40}  FAILED: {line['error']}"
    memory = f"{line['ours_memory']:.0f} / {line['peer_memory']:.0f}"
    cells = f"{line['ours']:>10g} {line['peer']:>10g} {line['unit']:<9} {line['ratio']:>6.2f}x {memory:>14}"
    extra = "".join(f"\n    {name} = {value}" for name, value in line.get("extra", {}).items())
    return f"{line['case']:40} {cells}  {line['peer_name']}{extra}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark by its name; exit status 1 when a case fails, never because ours is slower."""
    names = sorted(p.stem for p in HERE.glob("*.py") if "\nBENCHMARK = " in p.read_text())
    parser = argparse.ArgumentParser(description="Compare ours with a peer, interleaved, in one run.")
    parser.add_argument("name", choices=names)
    parser.add_argument("--json", action="store_true", help="one JSON line per case instead of a table")
    parser.add_argument("--seed", type=int, help="also measure three shapes drawn near the named ones")
    parser.add_argument("--turns", type=int, default=Options.turns, help="timed turns of each, at least 5")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each")
    parser.add_argument("--timeout", type=float, default=Options.timeout, help="seconds for one answer of a worker")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    given = parser.parse_args(arguments)
    options = Options(given.turns, given.threads, given.timeout, given.seed, given.case)
    if not given.json:
        print(f"{'case':40} {'ours':>10} {'peer':>10} {'unit':<9} {'ratio':>7} {'MB':>14}  peer", flush=True)
    failed = False
    for line in compare(str(HERE / f"{given.name}.py"), options):
        failed |= "error" in line
        print(json.dumps(line) if given.json else row(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
