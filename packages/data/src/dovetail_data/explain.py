"""Where the tokens of a batch come from."""

import dataclasses
from collections.abc import Mapping, Sequence

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
        source: the source's name in a mixture, else ''.
    """

    column: int
    document: int
    start: int
    stop: int
    epoch: int
    origin: str
    source: str = ""

    def __str__(self) -> str:
        where = f"columns {self.column}-{self.column + self.stop - self.start - 1}"
        which = f"{self.source} document {self.document}" if self.source else f"document {self.document}"
        return f"{where}: {which} tokens {self.start}-{self.stop - 1} epoch {self.epoch} {self.origin}"


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


def explain(
    sources: Mapping[str, TokenSource], step: int, raw_step: int, of_row: Sequence[int], pieces: Pieces
) -> Explanation:
    """Name the documents of each row's pieces; `of_row` is the number of each row's source, -1 for empty rows."""
    known = list(sources.items())
    rows: list[list[Piece]] = [[] for _ in of_row]
    columns = [0] * len(rows)
    for document, start, stop, epoch, row in zip(*(array.tolist() for array in pieces), strict=True):
        name, source = known[of_row[row]]
        rows[row].append(Piece(columns[row], document, start, stop, epoch, source.origin(document), name))
        columns[row] += stop - start
    return Explanation(step, raw_step, tuple(map(tuple, rows)))
