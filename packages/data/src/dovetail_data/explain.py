"""Where the tokens of a batch come from."""

import dataclasses
from collections.abc import Sequence

from dovetail_data.stream import Pieces
from dovetail_data.tokens import TokenSource

__all__ = ["Explanation", "Piece", "explain"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document in a row of T+1 tokens.

    Attributes:
        column: where the piece begins in the row.
        document: the document's number in the plan's source.
        start: the first token in the document.
        stop: one more than the last.
        epoch: the epoch that the document is read in, from 0.
        origin: the id that the corpus gave to the document.
    """

    column: int
    document: int
    start: int
    stop: int
    epoch: int
    origin: str

    def __str__(self) -> str:
        where = f"columns {self.column}-{self.column + self.stop - self.start - 1}"
        return f"{where}: document {self.document} tokens {self.start}-{self.stop - 1} epoch {self.epoch} {self.origin}"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Where the rows of a step come from.

    Attributes:
        step: the step.
        raw_step: the same step in the plan without skipped ranges.
        rows: the pieces of each row's T+1 tokens; the last token of a row is also the first of the next one.
    """

    step: int
    raw_step: int
    rows: tuple[tuple[Piece, ...], ...]

    def __str__(self) -> str:
        lines = [f"step {self.step} (without skips: {self.raw_step})"]
        for number, row in enumerate(self.rows):
            lines.append(f"row {number}")
            lines.extend(f"  {piece}" for piece in row)
        return "\n".join(lines)


def explain(source: TokenSource, step: int, raw_step: int, rows: Sequence[Pieces]) -> Explanation:
    """Name the documents of each row's pieces."""
    return Explanation(step, raw_step, tuple(_row(source, pieces) for pieces in rows))


def _row(source: TokenSource, pieces: Pieces) -> tuple[Piece, ...]:
    out: list[Piece] = []
    column = 0
    for document, start, stop, epoch in zip(*(array.tolist() for array in pieces), strict=True):
        out.append(Piece(column, document, start, stop, epoch, source.origin(document)))
        column += stop - start
    return tuple(out)
