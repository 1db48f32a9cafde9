"""Data: packed batches of training rows per CPU-second, against Grain at its best setting on the same mapped file.

Both read one file of uint16 tokens, shuffle its documents, pack them into rows and make batches, for a whole epoch in
one process. Grain reads ahead with no threads, its fastest setting for local data by far. What a turn must agree on is
how many tokens the rows hold and the sum of their ids; Grain drops the rows that fill no batch. Ours makes inputs,
targets, weights, positions and segments, Grain tokens, positions and segments.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol import Benchmark, Case, Contestant, nearby

NAMED = {"documents": 30_000, "mean": 519, "seq_len": 2048, "batch": 8}
BINS = 64  # that Grain's packers hold open
FOLDER = Path(__file__).resolve().parents[2] / ".nox" / "bench-data"


def corpus(c: dict[str, Any]) -> tuple[Path, Any]:
    """Write the file, unless it is there; return it with the documents' lengths, log-normal as web text is."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = rng.lognormal(0.0, 1.1, c["documents"])
    lengths = np.maximum((lengths * c["mean"] / lengths.mean()).astype(np.int64), 2)
    lengths[: c["documents"] * c["mean"] - lengths.sum()] += 1  # what was rounded down
    path = FOLDER / f"{c['documents']}-{c['mean']}.bin"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        tokens = rng.integers(1, 50_000, lengths.sum(), dtype=np.uint16)
        tokens[np.cumsum(lengths) - 1] = 0
        partial = path.with_suffix(".partial")
        tokens.tofile(partial)
        partial.rename(path)
    return path, lengths


class Epoch:
    """Counts what an epoch's batches hold: their tokens in the first turn, which warms up, later ones their number."""

    clock = staticmethod(time.process_time)

    def __init__(self, c: dict[str, Any]) -> None:
        self.config = c
        self.sums = [0, 0, 0]  # places, tokens, and the sum of their ids
        self.counts: set[int] = set()

    def run(self) -> None:
        """One epoch."""
        started, count, summed = time.perf_counter(), 0, not self.counts
        for tokens, segments in self.batches():
            if not count:
                self.first = time.perf_counter() - started
            count += 1
            if summed:
                found = tokens.size, int((segments > 0).sum()), int(tokens.sum(dtype="int64"))
                self.sums = [a + b for a, b in zip(self.sums, found, strict=True)]
        self.counts.add(count)
        if len(self.counts) > 1:
            raise RuntimeError(f"epochs of {sorted(self.counts)} batches; expected the same number in every turn")

    def checksum(self) -> list[float]:
        """Tokens, and the sum of their ids."""
        return [float(value) for value in self.sums[1:]]

    def extra(self) -> dict[str, float]:
        """Milliseconds until the first batch, and the share of the rows that is no padding."""
        return {"first_ms": round(1e3 * self.first, 1), "filled": round(self.sums[1] / self.sums[0], 4)}


class Dovetail(Epoch):
    """A plan and its loader, with the threads that it takes by default."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__(c)
        import dovetail_data

        path, _ = corpus(c)
        self.source = dovetail_data.FileTokens(path, eos_id=0, vocab_size=50_000)
        self.name, self.plan = f"dovetail-data, {c['packing']}", dovetail_data.Plan

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Of one epoch, the plan included."""
        c = self.config
        options = {"seq_len": c["seq_len"], "batch": c["batch"], "packing": c["packing"], "over_long": c["over_long"]}
        loader = iter(self.plan(self.source, **options, seed=0, epochs=1).loader())
        for batch in loader:
            yield batch.tokens, batch.segment_ids
        loader.close()


class Grain(Epoch):
    """Grain's packing datasets over a source of views of the mapped file."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__(c)
        import grain
        import numpy as np

        path, lengths = corpus(c)
        tokens, ends = np.memmap(path, np.uint16, "r"), np.cumsum(lengths).tolist()
        starts = [0, *ends[:-1]]
        longest = c["seq_len"]

        class Documents:
            def __len__(self) -> int:
                return len(ends)

            def __getitem__(self, index: int) -> dict[str, Any]:
                part = tokens[starts[index] : ends[index]]
                return {"tokens": part if c["packing"] == "cut" else part[:longest]}

        self.name, self.grain, self.documents = f"grain {grain.__version__}", grain, Documents()

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Of one epoch."""
        c, grain = self.config, self.grain
        documents = grain.MapDataset.source(self.documents).shuffle(seed=0)
        rows = documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        struct = {"tokens": c["seq_len"]}
        if c["packing"] == "cut":
            rows = grain.experimental.ConcatThenSplitIterDataset(rows, length_struct=struct)
        else:
            names = {"first_fit": "FirstFitPackIterDataset", "best_fit": "BestFitPackIterDataset"}
            packed = getattr(grain.experimental, names[c["packing"]])
            rows = packed(rows, length_struct=struct, num_packing_bins=BINS)
        for batch in rows.batch(c["batch"]):
            yield batch["tokens"], batch["tokens_segment_ids"]


def cases(rng: random.Random | None) -> list[Case]:
    """Every packing; with a generator three shapes near each."""
    steps = {"documents": 1000, "mean": 1, "seq_len": 128, "batch": 1}
    return [
        case({**shape, "packing": packing, "over_long": "split" if packing == "cut" else "crop"})
        for packing in ("cut", "first_fit", "best_fit")
        for shape in [NAMED, *(nearby(rng, NAMED, steps) for _ in range(3 if rng else 0))]
    ]


def case(c: dict[str, Any]) -> Case:
    """One packing of one corpus."""
    millions = c["documents"] * c["mean"] / 1e6
    name = f"{c['packing']} T{c['seq_len']} B{c['batch']}, {millions:.1f}M tokens"
    return Case(name, c, tolerance=3e-3, unit="Mtok/CPU-s", work=millions)


BENCHMARK = Benchmark("data", Contestant("Dovetail", "ours"), Contestant("Grain", "ours"), cases)
