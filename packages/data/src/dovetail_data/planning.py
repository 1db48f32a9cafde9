"""Plan: the batch of any step, a pure function of (data, seed, step).

Rows of T+1 tokens are made of the documents of a source: cut out of a stream of them (`cutting`), or packed (`packed`).
A mixture has the rows of several sources, in turns. Step ``k`` is the rows from ``schedule.first_row(k)`` on.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import xxhash
from jaxtyping import Int64, Integer

from dovetail_data.cutting import CutRows
from dovetail_data.explain import Explanation, explain
from dovetail_data.interleaving import shares
from dovetail_data.mixture import Mixture, Timeline
from dovetail_data.packed import PackedRows, Yield
from dovetail_data.packing import OverLong
from dovetail_data.rows import assemble
from dovetail_data.schedule import Schedule, Stages
from dovetail_data.skips import Skips, merged
from dovetail_data.stream import Pieces
from dovetail_data.tokens import TokenSource

if TYPE_CHECKING:
    import dovetail_protocols
    from dovetail_data.loader import PlanDataset

__all__ = ["Packing", "Plan", "Positions", "Shuffle"]

Positions: TypeAlias = Literal["restart", "continue"]
Shuffle: TypeAlias = Literal["rows", "documents"]
Packing: TypeAlias = Literal["cut", "first_fit", "best_fit"]


class Plan:
    """The batches of all steps of training on a cache, a view of it, or a mixture; every argument is an attribute.

    Args:
        source: where documents come from, or a `Mixture` of such sources.
        seq_len: T, inputs (and targets) per row.
        batch: rows per step; or stages, pairs of a step and the rows from it on, the first one at step 0.
        seed: 0 to 2**64 - 1; with the epoch's number it decides the order of the documents.
        epochs: None for a plan without end. A finite plan ends with a batch whose rest is padding (segment 0, weight
            0), so that it too has every target once. Of a mixture, see its ``max_epochs``.
        skip: half-open ranges of steps to leave out, in the steps of the plan without ranges.
        packing: ``cut`` cuts a stream of documents into rows without padding. ``first_fit`` and ``best_fit`` fill rows
            with whole documents and pad them; best fit pads least, first fit keeps neighbours together.
        over_long: what a packing does with documents of more than T+1 tokens: ``split`` them into rows that overlap by
            a token, ``crop`` or ``drop`` them, or raise an ``error``.
        positions: ``restart`` counts from 0 at the beginning of each document and of each row; ``continue`` goes on
            where the row before left a document that was cut, so a position is the token's place in its document.
        across_documents: whether the first token of a document is a target. By default it has weight 0: nothing that
            comes before it tells what it is. The end token belongs to its document and always is a target.
        shuffle: ``rows`` also shuffles the rows that the documents were cut or packed into, an epoch's worth at a time
            (of more than 2**20 documents, the rows of so many), so that the rows of a batch come from different
            documents; ``documents`` keeps a long document's rows together.

    Raises:
        ValueError: an argument out of range, or a source with fewer than two tokens.
    """

    def __init__(
        self,
        source: TokenSource | Mixture,
        *,
        seq_len: int,
        batch: Stages,
        seed: int,
        epochs: int | None = None,
        skip: Iterable[Sequence[int]] = (),
        packing: Packing = "cut",
        over_long: OverLong = "split",
        positions: Positions = "restart",
        across_documents: bool = False,
        shuffle: Shuffle = "rows",
    ) -> None:
        self.source = source
        self.seq_len = _at_least("seq_len", seq_len, 1)
        self.batch = batch
        self.schedule = Schedule(batch)
        self.seed = _at_least("seed", seed, 0)
        self.epochs = None if epochs is None else _at_least("epochs", epochs, 1)
        self.skips = Skips(merged(skip))
        self.packing: Packing = packing
        self.over_long: OverLong = over_long
        self.positions = positions
        self.across_documents = bool(across_documents)
        self.shuffle = shuffle
        for name, value, known in (
            ("positions", positions, Positions),
            ("shuffle", shuffle, Shuffle),
            ("packing", packing, Packing),
            ("over_long", over_long, OverLong),
        ):
            if value not in get_args(known):
                raise ValueError(f"{name}={value!r}; expected one of {get_args(known)}")
        if self.seed >= 2**64:
            raise ValueError(f"seed={seed}; expected 0 to 2**64 - 1")
        if isinstance(source, Mixture) and epochs is not None:
            raise ValueError(f"epochs={epochs} of a mixture; expected max_epochs in the mixture itself")
        self._sources = dict(source.sources) if isinstance(source, Mixture) else {"": source}
        self._layouts = [self._layout(name) for name in self._sources]
        self._timeline = self._mixed(source) if isinstance(source, Mixture) else None

    @property
    def fingerprint(self) -> str:
        """What the batches depend on, as ``name=value`` parts (not `epochs`, which only says where to end)."""
        parts = {
            "data": ",".join(
                f"{name}:{one.fingerprint}" if name else one.fingerprint for name, one in self._sources.items()
            )
        }
        if isinstance(self.source, Mixture):
            parts["mixture"] = _described(self.source)
        parts |= {"seed": str(self.seed), "seq_len": str(self.seq_len), "batch": str(self.schedule)}
        if self.packing != "cut":
            parts |= {"packing": self.packing, "over_long": self.over_long}
        parts |= {"positions": self.positions, "across_documents": str(self.across_documents), "shuffle": self.shuffle}
        return " ".join(f"{name}={value}" for name, value in parts.items()) + f" skip={self.skips}"

    @property
    def steps_per_epoch(self) -> float:
        """How many steps of the first batch size it takes to have each token as a target once; of a mixture, each row.

        Rarely a whole number.
        """
        return sum(layout.per_epoch for layout in self._layouts) / self.schedule.batch(0)

    @property
    def rows(self) -> int | None:
        """The number of rows that a finite plan has, else None; the last batch is padded with empty ones."""
        return self._layouts[0].count if self._timeline is None else self._timeline.count

    @functools.cached_property
    def steps(self) -> int | None:
        """The number of steps that a finite plan has, else None."""
        if self.rows is None:
            return None
        raw = self.schedule.steps(self.rows)
        skipped = sum(max(min(stop, raw) - start, 0) for start, stop in self.skips.ranges)
        return raw - skipped

    @property
    def yields(self) -> dict[str, Yield]:
        """What becomes of the tokens of an epoch of each source that is packed; the name of a single source is ''."""
        pairs = zip(self._sources, self._layouts, strict=True)
        return {name: layout.summary for name, layout in pairs if isinstance(layout, PackedRows)}

    def counts(self, step: int) -> dict[str, int]:
        """Return how many rows of each source come before a step (of the plan without skipped ranges)."""
        rows = self.schedule.first_row(step)
        if self._timeline is None:
            return {"": rows if self.rows is None else min(rows, self.rows)}
        return dict(zip(self._sources, self._timeline.counts(rows).tolist(), strict=True))

    def at(self, step: int) -> "dovetail_protocols.LMBatch":
        """Return the batch of a step: NumPy arrays of shape ``[batch, seq_len]``.

        Segments are numbered from 1 in each row; 0 is padding, which only the last batch of a finite plan has.

        Raises:
            IndexError: `step` is negative or past the end of a finite plan.
        """
        return self.rows_at(step, 0, self.batch_at(step))

    def batch_at(self, step: int) -> int:
        """Return the rows of a step.

        Raises:
            IndexError: the plan has no such step.
        """
        return self.schedule.batch(self._raw(step))

    def rows_at(self, step: int, start: int, stop: int) -> "dovetail_protocols.LMBatch":
        """Return the rows ``[start, stop)`` of ``at(step)``, reading no others.

        Raises:
            IndexError: the plan has no such step, or the batch no such rows.
        """
        return self.rows_of([(step, start, stop)])[0]

    def rows_of(self, parts: Sequence[tuple[int, int, int]]) -> "list[dovetail_protocols.LMBatch]":
        """Return the rows ``[start, stop)`` of each ``(step, start, stop)``, faster than one by one; steps must rise.

        Raises:
            IndexError: the plan has no such step, or a batch no such rows.
        """
        rows: list[Any] = []
        for step, start, stop in parts:
            raw = self._raw(step)
            if not 0 <= start < stop <= self.schedule.batch(raw):
                raise IndexError(f"rows {start} to {stop} of a batch of {self.schedule.batch(raw)}")
            first = self.schedule.first_row(raw)
            rows.append(np.arange(first + start, first + stop))
        if len(rows) == 1:
            return [self._rows(rows[0])]
        whole, ends = self._rows(np.concatenate(rows)), [0, *itertools.accumulate(map(len, rows))]
        return [
            whole._replace(**{name: array[begin:end] for name, array in whole._asdict().items() if array is not None})
            for begin, end in itertools.pairwise(ends)
        ]

    def explain(self, step: int) -> Explanation:
        """Return which documents each row of ``at(step)`` holds.

        Raises:
            IndexError: the plan has no such step.
        """
        raw = self._raw(step)
        first = self.schedule.first_row(raw)
        sources, pieces = self._pieces(np.arange(first, first + self.schedule.batch(raw)))
        return explain(self._sources, operator.index(step), raw, sources.tolist(), pieces)

    def loader(
        self, *, start_step: int = 0, process_index: int = 0, process_count: int = 1, prefetch: int = 2
    ) -> "PlanDataset":
        """Return a Grain dataset of the batches from `start_step` on.

        ``iter(...)`` of it is an iterator with ``get_state``, ``set_state`` and ``close``. Process ``i`` of ``n`` gets
        the rows ``[i*batch/n, (i+1)*batch/n)`` of each batch.

        Args:
            start_step: the first step.
            process_index: which of the processes this is.
            process_count: how many processes share a batch; must divide `batch`.
            prefetch: batches that threads make ahead, where one takes longer to make than to hand over (2 ms); 0 for
                none. It never changes the data.

        Raises:
            ValueError: an argument out of range.
        """
        from dovetail_data.loader import PlanDataset  # Grain takes seconds to import

        return PlanDataset(
            self,
            start_step=start_step,
            process_index=process_index,
            process_count=process_count,
            prefetch=prefetch,
        )

    def _raw(self, step: int) -> int:
        number = operator.index(step)
        if number < 0 or (self.steps is not None and number >= self.steps):
            end = "0 or more" if self.steps is None else f"0 to {self.steps - 1}"
            raise IndexError(f"step {number}; this plan has the steps {end}")
        return self.skips.raw(number)

    def _rows(self, rows: Int64[np.ndarray, " rows"]) -> "dovetail_protocols.LMBatch":
        sources, pieces = self._pieces(rows)
        tokens, learned = self._tokens(sources, pieces)
        return assemble(
            tokens,
            learned,
            pieces,
            len(rows),
            seq_len=self.seq_len,
            restart=self.positions == "restart",
            across=self.across_documents,
        )

    def _pieces(self, rows: Int64[np.ndarray, " rows"]) -> tuple[Int64[np.ndarray, " rows"], Pieces]:
        """Return the source of each row, -1 past the end, and the pieces of all."""
        if self._timeline is None:
            return np.zeros(len(rows), np.int64), self._layouts[0].pieces(rows)
        sources, ordinals = self._timeline.find(rows)
        parts: list[Pieces] = []
        for number in np.unique(sources[sources >= 0]).tolist():
            mine = np.flatnonzero(sources == number)
            parts.append(self._layouts[number].pieces(ordinals[mine]).of_rows(mine))
        return sources, Pieces.joined(parts)

    def _tokens(
        self, sources: Int64[np.ndarray, " rows"], pieces: Pieces
    ) -> tuple[Integer[np.ndarray, " tokens"], Integer[np.ndarray, " tokens"] | None]:
        """Return the tokens of all pieces, one after the other, and which of them are learned; None if all are."""
        documents, starts, stops = pieces[:3]
        every = list(self._sources.values())
        if len(every) == 1:
            return every[0].gather(documents, starts, stops), every[0].weights(documents, starts, stops)
        owners = sources[pieces.rows]
        of_token = owners.repeat(stops - starts)
        tokens, learned, all_learned = np.empty(len(of_token), np.int32), np.ones(len(of_token), np.uint8), True
        for number in np.unique(owners).tolist():
            mine, theirs = owners == number, of_token == number
            asked = documents[mine], starts[mine], stops[mine]
            tokens[theirs] = every[number].gather(*asked)
            if (weights := every[number].weights(*asked)) is not None:
                learned[theirs], all_learned = weights, False
        return tokens, None if all_learned else learned

    def _layout(self, name: str) -> CutRows | PackedRows:
        """Return the rows of one source."""
        source = self._sources[name]
        which = f"source {name!r}" if name else "the source"
        if source.tokens < 2:
            raise ValueError(f"{which} has {source.tokens} tokens; expected at least 2, an input and a target")
        if source.vocab_size > 2**31 or (self.positions == "continue" and source.lengths.max() > 2**31):
            raise ValueError(f"token ids and positions are int32; {which} has larger ones")
        epochs, seed = self.epochs, self.seed
        if isinstance(self.source, Mixture):
            epochs = self.source.max_epochs.get(name)
            seed = xxhash.xxh3_64_intdigest(name.encode(), seed=self.seed)
        common: dict[str, Any] = {"seq_len": self.seq_len, "seed": seed, "epochs": epochs}
        common["shuffled"] = self.shuffle == "rows"
        if self.packing == "cut":
            return CutRows(source, **common)
        return PackedRows(source, **common, packing=self.packing, over_long=self.over_long)

    def _mixed(self, mixture: Mixture) -> Timeline:
        stages: list[tuple[int, Sequence[int]]] = []
        for start, weights in mixture.stages:
            row = self.schedule.first_row(start) if mixture.unit == "steps" else -(-start // self.seq_len)
            if stages and stages[-1][0] == row:
                stages.pop()  # two starts fall into one row
            stages.append((row, _turns(mixture, weights)))
        return Timeline(stages, [layout.count for layout in self._layouts], stop=mixture.on_exhausted == "stop")


def _turns(mixture: Mixture, weights: Mapping[str, float | int]) -> tuple[int, ...]:
    """Return the turns that each source has in a period."""
    return shares([weights.get(name, 0) for name in mixture.sources])


def _described(mixture: Mixture) -> str:
    """Return the stages of a mixture in whole turns, and its limits, without spaces."""
    stages: list[str] = []
    for start, weights in mixture.stages:
        turns = zip(mixture.sources, _turns(mixture, weights), strict=True)
        stages.append(f"{start}:" + "+".join(f"{turn}*{name}" for name, turn in turns if turn))
    limits = [f"{name}<={most}" for name, most in sorted(mixture.max_epochs.items())]
    return ";".join([f"{mixture.unit},{mixture.on_exhausted}", *limits, *stages])


def _at_least(name: str, value: Any, least: int) -> int:
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}={number}; expected at least {least}")
    return number
