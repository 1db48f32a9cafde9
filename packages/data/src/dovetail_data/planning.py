"""Plan: the batch of any step, a pure function of (data, seed, step).

The stream (see `stream`) is cut into rows of T+1 tokens with stride T: a row begins with the last token of the row
before, so every token of the stream but its very first is a target exactly once. Row ``r`` holds the tokens
``[r*T, r*T + T]``; step ``k`` is the rows ``k*batch`` to ``(k+1)*batch``, so epochs follow one another without a gap,
also inside a batch or a row.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from dovetail_data.explain import Explanation, explain
from dovetail_data.rows import assemble
from dovetail_data.skips import Skips, merged
from dovetail_data.stream import Stream
from dovetail_data.tokens import TokenSource

if TYPE_CHECKING:
    import dovetail_protocols
    from dovetail_data.loader import PlanDataset

__all__ = ["Plan", "Positions", "plan"]

Positions: TypeAlias = Literal["restart", "continue"]


def plan(
    source: TokenSource,
    *,
    seq_len: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
    skip: Iterable[Sequence[int]] = (),
    positions: Positions = "restart",
    across_documents: bool = False,
) -> "Plan":
    """Return the plan that trains on a cache, or on a view of it.

    Args:
        source: where documents come from.
        seq_len: T, inputs (and targets) per row.
        batch: rows per step.
        seed: 0 to 2**64 - 1; with the epoch's number it decides the order of the documents.
        epochs: None for a plan without end. A finite plan ends with a batch whose rest is padding (segment 0, weight
            0), so that it too has every target once.
        skip: half-open ranges of steps to leave out, in the steps of the plan without ranges.
        positions: ``restart`` counts from 0 at the beginning of each document and of each row; ``continue`` goes on
            where the row before left a document that was cut, so a position is the token's place in its document.
        across_documents: whether the first token of a document is a target. By default it has weight 0: nothing that
            comes before it tells what it is. The end token belongs to its document and always is a target.

    Raises:
        ValueError: an argument out of range, or a source with fewer than two tokens.
    """
    return Plan(
        source,
        seq_len=seq_len,
        batch=batch,
        seed=seed,
        epochs=epochs,
        skip=skip,
        positions=positions,
        across_documents=across_documents,
    )


class Plan:
    """The batches of all steps; made by `plan`.

    Attributes:
        source: where documents come from.
        seq_len: T.
        batch: rows per step.
        seed: of the order.
        epochs: None for a plan without end.
        skips: ranges of steps that are left out.
        positions: how positions count.
        across_documents: whether the first token of a document is a target.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        seq_len: int,
        batch: int,
        seed: int,
        epochs: int | None = None,
        skip: Iterable[Sequence[int]] = (),
        positions: Positions = "restart",
        across_documents: bool = False,
    ) -> None:
        self.source = source
        self.seq_len = _at_least("seq_len", seq_len, 1)
        self.batch = _at_least("batch", batch, 1)
        self.seed = _at_least("seed", seed, 0)
        self.epochs = None if epochs is None else _at_least("epochs", epochs, 1)
        self.skips = Skips(merged(skip))
        self.positions = positions
        self.across_documents = bool(across_documents)
        if positions not in get_args(Positions):
            raise ValueError(f"positions={positions!r}; expected one of {get_args(Positions)}")
        if self.seed >= 2**64:
            raise ValueError(f"seed={seed}; expected 0 to 2**64 - 1")
        if source.tokens < 2:
            raise ValueError(f"the source has {source.tokens} tokens; expected at least 2, an input and a target")
        if source.vocab_size > 2**31 or (positions == "continue" and source.lengths.max() > 2**31):
            raise ValueError("token ids and positions are int32; expected at most 2**31 ids and tokens per document")
        self._stream = Stream(source, self.seed)

    @property
    def fingerprint(self) -> str:
        """What the batches depend on, as ``name=value`` parts (not `epochs`, which only says where to end)."""
        data = f"data={self.source.fingerprint} seed={self.seed} seq_len={self.seq_len} batch={self.batch}"
        return f"{data} positions={self.positions} across_documents={self.across_documents} skip={self.skips}"

    @property
    def steps_per_epoch(self) -> float:
        """How many steps it takes to have each token as a target once; rarely a whole number."""
        return self.source.tokens / (self.batch * self.seq_len)

    @property
    def steps(self) -> int | None:
        """The number of steps that a finite plan has, else None."""
        if self.epochs is None:
            return None
        raw = math.ceil((self.epochs * self.source.tokens - 1) / (self.seq_len * self.batch))
        skipped = sum(max(min(stop, raw) - start, 0) for start, stop in self.skips.ranges)
        return raw - skipped

    def at(self, step: int) -> "dovetail_protocols.LMBatch":
        """Return the batch of a step: NumPy arrays of shape ``[batch, seq_len]``.

        Segments are numbered from 1 in each row; 0 is padding, which only the last batch of a finite plan has. `tokens`
        and `targets` are read-only views of the same memory.

        Raises:
            IndexError: `step` is negative or past the end of a finite plan.
        """
        return self.rows_at(step, 0, self.batch)

    def rows_at(self, step: int, start: int, stop: int) -> "dovetail_protocols.LMBatch":
        """Return the rows ``[start, stop)`` of ``at(step)``, reading no others.

        Raises:
            IndexError: the plan has no such step, or the batch no such rows.
        """
        if not 0 <= start < stop <= self.batch:
            raise IndexError(f"rows {start} to {stop} of a batch of {self.batch}")
        return self._rows(self._raw(step) * self.batch + start, stop - start)

    def explain(self, step: int) -> Explanation:
        """Return which documents each row of ``at(step)`` holds.

        Raises:
            IndexError: the plan has no such step.
        """
        raw = self._raw(step)
        rows = [self._stream.pieces(*self._span(raw * self.batch + row, 1)) for row in range(self.batch)]
        return explain(self.source, operator.index(step), raw, rows)

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
            prefetch: batches that threads make ahead; 0 for none. It never changes the data.

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

    def _span(self, row: int, count: int) -> tuple[int, int]:
        """Return the range of the stream that some rows cover."""
        stop = (row + count) * self.seq_len + 1
        return row * self.seq_len, stop if self.epochs is None else min(stop, self.epochs * self.source.tokens)

    def _rows(self, row: int, count: int) -> "dovetail_protocols.LMBatch":
        pieces = self._stream.pieces(*self._span(row, count))
        tokens = self.source.gather(pieces.documents, pieces.starts, pieces.stops).astype(np.int32)
        restart = self.positions == "restart"
        return assemble(tokens, pieces, rows=count, seq_len=self.seq_len, restart=restart, across=self.across_documents)


def _at_least(name: str, value: Any, least: int) -> int:
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}={number}; expected at least {least}")
    return number
