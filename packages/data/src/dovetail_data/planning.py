"""Plan: the batch of any step, a pure function of (data, seed, step).

The stream (see `stream`) is cut into rows of T+1 tokens with stride T: a row begins with the last token of the row
before, so every token of the stream but its very first is a target exactly once. Row ``r`` holds the tokens
``[r*T, r*T + T]``; epochs follow one another without a gap, also inside a row. Blocks of as many rows as an epoch fills
are permuted, each by a permutation of its own; step ``k`` is the rows ``k*batch`` to ``(k+1)*batch`` after that.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Int64

from dovetail_data.explain import Explanation, explain
from dovetail_data.permutation import Permutation
from dovetail_data.rows import assemble
from dovetail_data.skips import Skips, merged
from dovetail_data.stream import Pieces, Stream
from dovetail_data.tokens import TokenSource

if TYPE_CHECKING:
    import dovetail_protocols
    from dovetail_data.loader import PlanDataset

__all__ = ["Plan", "Positions", "Shuffle"]

Positions: TypeAlias = Literal["restart", "continue"]
Shuffle: TypeAlias = Literal["rows", "documents"]
_ROW_STREAMS = 2**63  # epochs number the permutations of documents, these and what follows those of rows


class Plan:
    """The batches of all steps of training on a cache, or on a view of it; every argument is an attribute.

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
        shuffle: ``rows`` also shuffles the rows that the documents were cut into, an epoch's worth at a time, so that
            the rows of a batch come from different documents; ``documents`` keeps a long document's rows together.

    Raises:
        ValueError: an argument out of range, or a source with fewer than two tokens.
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
        shuffle: Shuffle = "rows",
    ) -> None:
        self.source = source
        self.seq_len = _at_least("seq_len", seq_len, 1)
        self.batch = _at_least("batch", batch, 1)
        self.seed = _at_least("seed", seed, 0)
        self.epochs = None if epochs is None else _at_least("epochs", epochs, 1)
        self.skips = Skips(merged(skip))
        self.positions = positions
        self.across_documents = bool(across_documents)
        self.shuffle = shuffle
        for name, value, known in (("positions", positions, Positions), ("shuffle", shuffle, Shuffle)):
            if value not in get_args(known):
                raise ValueError(f"{name}={value!r}; expected one of {get_args(known)}")
        if self.seed >= 2**64:
            raise ValueError(f"seed={seed}; expected 0 to 2**64 - 1")
        if source.tokens < 2:
            raise ValueError(f"the source has {source.tokens} tokens; expected at least 2, an input and a target")
        if source.vocab_size > 2**31 or (positions == "continue" and source.lengths.max() > 2**31):
            raise ValueError("token ids and positions are int32; expected at most 2**31 ids and tokens per document")
        self._stream = Stream(source, self.seed)
        self._block = max(1, (source.tokens - 1) // self.seq_len)  # whole blocks fit into any number of epochs

    @property
    def fingerprint(self) -> str:
        """What the batches depend on, as ``name=value`` parts (not `epochs`, which only says where to end)."""
        data = f"data={self.source.fingerprint} seed={self.seed} seq_len={self.seq_len} batch={self.batch}"
        options = f"positions={self.positions} across_documents={self.across_documents} shuffle={self.shuffle}"
        return f"{data} {options} skip={self.skips}"

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

        Segments are numbered from 1 in each row; 0 is padding, which only the last batch of a finite plan has.

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
        return explain(self.source, operator.index(step), raw, self._pieces(raw * self.batch, self.batch))

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

    def _rows(self, row: int, count: int) -> "dovetail_protocols.LMBatch":
        rows = self._pieces(row, count)
        documents, starts, stops, _ = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        tokens = self.source.gather(documents, starts, stops).astype(np.int32)
        restart = self.positions == "restart"
        return assemble(tokens, rows, seq_len=self.seq_len, restart=restart, across=self.across_documents)

    def _pieces(self, row: int, count: int) -> list[Pieces]:
        """Return the pieces of some rows, each with its T+1 tokens."""
        return [self._stream.pieces(*self._span(place)) for place in self._places(row, count).tolist()]

    def _span(self, row: int) -> tuple[int, int]:
        """Return the range of the stream that a row covers."""
        start, stop = row * self.seq_len, (row + 1) * self.seq_len + 1
        return (start, stop) if self._end is None else (min(start, self._end), min(stop, self._end))

    @property
    def _end(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.source.tokens

    def _places(self, row: int, count: int) -> Int64[np.ndarray, " rows"]:
        """Return where in the stream some rows stand: a permutation of each block of an epoch's worth of rows.

        What follows the last whole block of a finite plan stays in order, so that padding comes last.
        """
        rows = np.arange(row, row + count)
        if self.shuffle == "documents":
            return rows
        blocks, places = np.divmod(rows, self._block)
        for block in np.unique(blocks).tolist():
            if self._end is None or (block + 1) * self._block * self.seq_len < self._end:
                mine = blocks == block
                order = Permutation(self._block, seed=self.seed, stream=_ROW_STREAMS + block)
                rows[mine] = block * self._block + order(places[mine])
        return rows


def _at_least(name: str, value: Any, least: int) -> int:
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}={number}; expected at least {least}")
    return number
