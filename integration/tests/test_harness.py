"""The benchmark harness with fake systems: what it times, whom it stops, what it refuses."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import environments
import harness
import protocol
import pytest

BENCHMARKS = Path(harness.__file__).parent

FILE = '''
import os, signal, sys, time
from pathlib import Path
from protocol import Benchmark, Case, Contestant, nearby

class Fake:
    pause, drift, name = 0.0, 0.0, "fake 1.0"
    def __init__(self, config):
        print("noise on stdout")
        self.config, self.count = config, 0
    def run(self):
        self.count += 1
        time.sleep(self.config.get("pause", 0.01) + self.pause)
    def checksum(self):
        return [1.0, self.count * (1 + self.drift)]
    def memory(self):
        return 12.5

class Slow(Fake):
    name, pause = "slow 2.0", 0.02

class Wrong(Fake):
    drift = 1e-3

class TurnsWrong(Fake):
    def checksum(self):
        return [1.0, self.count if self.count < 3 else -1.0]

class NotANumber(Fake):
    def checksum(self):
        return [1.0, float("nan")]

class Short(Fake):
    def checksum(self):
        return [1.0]

class Raises(Fake):
    def run(self):
        raise RuntimeError("the system broke")

class Killed(Fake):
    def run(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Hangs(Fake):
    def run(self):
        time.sleep(100)

class CannotStart(Fake):
    def __init__(self, config):
        import no_such_module

class Plain:
    """Without the optional parts."""
    def __init__(self, config):
        self.block = bytearray(50_000_000)
    def run(self):
        self.block[::4096] = bytes(len(self.block[::4096]))
    def checksum(self):
        return [3.0]

class Words(Fake):
    def checksum(self):
        return {"words": ["a", "b" if self.count < 3 else "c"]}

class Marks(Fake):
    """Notes when it is awake."""
    def __init__(self, config):
        super().__init__(config)
        import threading
        self.seen = []
        threading.Thread(target=self.tick, daemon=True).start()
    def tick(self):
        while True:
            self.seen.append(time.monotonic())
            time.sleep(0.002)
    def extra(self):
        gaps = [b - a for a, b in zip(self.seen, self.seen[1:])]
        return {"longest_gap": max(gaps, default=0), "blocktime": os.environ["KMP_BLOCKTIME"],
                "threads": os.environ["OMP_NUM_THREADS"], "cpus": len(os.sched_getaffinity(0))}

class Pids(Fake):
    """Counts the processes that there were."""
    def extra(self):
        place = Path(__file__).with_suffix(".pids")
        with place.open("a") as file:
            print(os.getpid(), file=file)
        return {"processes": len(set(place.read_text().split()))}

def cases(rng):
    config = {"pause": 0.01, "size": 64}
    drawn = [Case(f"drawn {i}", nearby(rng, config, {"size": 8})) for i in range(3)] if rng else []
    often = Case("often", config, starts=3)
    own = Case("own", config, pair=(Contestant("Words", "current"), Contestant("PEER", "current")), agreement=agree)
    return [Case("named", config, tolerance=1e-6), Case("rate", config, unit="items/s", work=10.0), own, often, *drawn]

def agree(ours, peer):
    return None if ours["words"] == ["a", "b"] else f"{ours['words']} after {peer[1]:g}"

BENCHMARK = Benchmark("fake", Contestant("OURS", "current"), Contestant("PEER", "current"), cases)
'''


@pytest.fixture
def compare(tmp_path):
    def run(ours="Fake", peer="Fake", only="named", **options):
        path = tmp_path / "fake_benchmark.py"
        path.write_text(FILE.replace("OURS", ours).replace("PEER", peer))
        settings = {"turns": 5, "threads": 1, "timeout": 30.0, **options}
        return list(harness.compare(str(path), harness.Options(only=only, **settings)))

    return run


def test_the_line_has_the_stated_form(compare):
    """Scripts read these lines."""
    (line,) = compare()
    names = ["bench", "case", "ours", "peer", "unit", "peer_name", "ratio", "ours_memory", "peer_memory"]
    assert list(line) == names
    assert (line["bench"], line["case"], line["unit"], line["peer_name"]) == ("fake", "named", "ms", "fake 1.0")
    assert line["ours_memory"] == line["peer_memory"] == 12.5
    assert line["ours"] >= 10


def test_a_slow_system_is_printed_like_any_other(compare):
    """A benchmark that we lose shows a ratio below 1."""
    (line,) = compare(ours="Slow")
    assert line["ratio"] < 0.7
    assert f"{line['ratio']:.2f}x" in harness.row(line)
    (line,) = compare(peer="Slow")
    assert line["ratio"] > 1.4
    assert line["peer_name"] == "slow 2.0"


def test_several_pairs_of_processes_are_pooled(compare):
    """Whichever process starts first, its times are its own."""
    (line,) = compare(only="often", ours="Slow", peer="Pids")
    assert line["ratio"] < 0.7
    assert line["extra"] == {"peer_processes": 3}


def test_a_rate_is_better_when_larger(compare):
    """For tokens/s the ratio is not turned around."""
    (line,) = compare(ours="Slow", only="rate")
    assert line["ours"] < line["peer"] <= 1000
    assert line["ratio"] < 0.7


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("Wrong", "disagree in turn 0: value 1"),
        ("TurnsWrong", "disagree in turn 2: value 1"),
        ("NotANumber", "nan"),
        ("Short", "1 values against 2"),
    ],
)
def test_results_that_differ_are_rejected(compare, system, message):
    """A fast wrong answer must not win."""
    (line,) = compare(ours=system)
    assert message in line["error"]
    assert "ratio" not in line
    assert "FAILED" in harness.row(line)


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("Raises", "RuntimeError: the system broke"),
        ("Killed", "died of SIGKILL during 'run'"),
        ("CannotStart", "no_such_module"),
        ("NoSuchClass", "NoSuchClass"),
    ],
)
@pytest.mark.parametrize("side", ["ours", "peer"])
def test_a_dying_worker_is_reported(compare, system, message, side):
    """The reason is shown instead of a hang or a bare broken pipe."""
    (line,) = compare(**{side: system})
    assert message in line["error"]
    assert system in line["error"]


def test_a_hanging_worker_is_ended(compare):
    """A run in CI must end."""
    start = time.monotonic()
    (line,) = compare(peer="Hangs", timeout=2.0)
    assert "gave no answer to 'run' in 2 s" in line["error"]
    assert time.monotonic() - start < 20


def test_a_failed_case_does_not_stop_the_others(compare):
    """One wrong shape must not hide the results of the rest."""
    lines = compare(ours="Wrong", only="")
    assert ["error" in line for line in lines] == [True] * 4


def test_a_case_has_its_own_pair_and_agreement(compare):
    """Replies of words are no floats, and one subject may have several peers."""
    (line,) = compare(ours="NoSuchClass", only="own")
    assert line["error"] == "fake 1.0 and fake 1.0 disagree in turn 2: ['a', 'c'] after 3"


def test_only_one_worker_is_awake(compare):
    """Work of an idle contestant would be charged to the other."""
    (line,) = compare(ours="Marks", peer="Slow")
    assert line["extra"]["ours_longest_gap"] > 0.025
    assert line["extra"]["ours_blocktime"] == "0"
    assert line["extra"]["ours_threads"] == "1"
    assert line["extra"]["ours_cpus"] == 1
    assert "ours_longest_gap" in harness.row(line)


def test_memory_is_that_of_the_process_by_default(compare):
    """A system without `memory` is measured from outside."""
    (line,) = compare(ours="Plain", peer="Plain")
    assert 50 < line["ours_memory"] < 150
    assert line["peer_name"] == "Plain"


def test_a_seed_draws_three_shapes_near_the_named(compare):
    """Tuning to the named shapes only must show."""
    lines = compare(only="drawn", seed=3)
    assert [line["case"] for line in lines] == ["drawn 0", "drawn 1", "drawn 2"]
    config = {"m": 100, "k": 7, "name": "x"}
    drawn = [protocol.nearby(random.Random(seed), config, {"m": 10, "k": 1}) for seed in range(50)]
    assert all(70 <= d["m"] <= 150 and d["m"] % 10 == 0 and 4 <= d["k"] <= 10 and d["name"] == "x" for d in drawn)
    assert len({d["m"] for d in drawn}) > 3
    assert protocol.nearby(random.Random(1), config, {"m": 10}) == protocol.nearby(random.Random(1), config, {"m": 10})


def test_medians_not_means():
    """One interrupted turn must not decide."""
    benchmark = protocol.Benchmark("b", None, None, None)
    scores = [harness.Score("a", [1.0, 1.0, 1.0, 1.0, 100.0]), harness.Score("b", [2.0] * 5)]
    line = harness.result(benchmark, protocol.Case("c", {}), scores)
    assert (line["ours"], line["peer"], line["ratio"]) == (1000.0, 2000.0, 2.0)


@pytest.mark.parametrize("options", [{"turns": 4}, {"threads": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        harness.Options(**options)


def test_workers_end_with_the_harness(tmp_path):
    """A stopped child that outlives a killed harness would hold its memory forever."""
    (tmp_path / "f.py").write_text(FILE)
    program = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import harness
w = harness.Worker("w", [sys.executable, {str(BENCHMARKS / "worker.py")!r}, {str(tmp_path / "f.py")!r}, "Fake"], 1, 60)
w.ask(do="prepare", config={{}})
print(w.process.pid, flush=True)
time.sleep(100)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(child.stdout.readline())
    child.kill()
    child.wait()
    child.stdout.close()
    end = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_command_line_knows_the_benchmarks():
    """`nox -s bench -- NAME` passes these arguments on."""
    command = [sys.executable, str(BENCHMARKS / "harness.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "matmul" in shown.stdout
    for wrong in (["no-such-benchmark"], ["matmul", "--turns", "2"], ["harness"]):
        done = subprocess.run([*command, *wrong], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0


def test_every_benchmark_declares_known_environments():
    """A benchmark file is importable without jax or torch, and its cases are JSON."""
    for path in BENCHMARKS.glob("*.py"):
        if "\nBENCHMARK = " in path.read_text():
            benchmark = harness.load(str(path)).BENCHMARK
            assert benchmark.name == path.stem
            assert {benchmark.ours.environment, benchmark.peer.environment} <= set(environments.ENVIRONMENTS)
            cases = benchmark.cases(random.Random(0))
            used = {contestant.environment for case in cases for contestant in case.pair or ()}
            assert used <= set(environments.ENVIRONMENTS)
            assert len(cases) >= len(benchmark.cases(None))
            assert json.loads(json.dumps([case.config for case in cases]))


def test_a_missing_interpreter_says_which(monkeypatch):
    monkeypatch.setitem(os.environ, "UV_PYTHON_DOWNLOADS", "never")
    with pytest.raises(RuntimeError, match=r"Python 3\.99 is not installed"):
        environments.interpreter("3.99")
