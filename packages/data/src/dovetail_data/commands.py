"""The commands ``data.stats``, ``data.verify``, ``data.explain`` and ``data.show``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dovetail_data.cache import TokenCache
    from dovetail_data.explain import Piece
    from dovetail_data.planning import Plan
    from dovetail_data.tokens import TokenSource

__all__ = ["Explain", "Show", "Stats", "Verify"]

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Print what a token cache holds, and check every byte of it against its digests."""

    directory: Path
    """The token cache."""

    def run(self) -> int:
        """Print it; a damaged cache is a user error that names the files."""
        import numpy as np

        cache = _open(self.directory, "full")
        shortest = np.percentile(cache.lengths, _PERCENTILES, method="nearest").tolist()
        spread = "  ".join(f"p{p}: {value:,}" for p, value in zip(_PERCENTILES, shortest, strict=True))
        ratio = f"{cache.bytes / cache.tokens:.3f}"
        rows = {
            "documents": f"{len(cache):,}",
            "tokens": f"{cache.tokens:,} ({cache.manifest.dtype[1:]}, end tokens included)",
            "bytes of text": f"{cache.bytes:,}",
            "bytes per token": ratio,
            "tokens per document": f"mean {cache.tokens / len(cache):,.1f}  {spread}",
            "vocabulary": f"{cache.vocab_size:,} (end of document: {cache.eos_id})",
            "shards": f"{len(cache.manifest.shards):,}",
            "fingerprint": cache.fingerprint,
            "corpus": cache.manifest.corpus,
            "tokenizer": cache.manifest.tokenizer,
            "digests": "all match",
        }
        for name, value in rows.items():
            print(f"{name:20} {value}")
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare every byte of a token cache with its digests."""

    directory: Path
    """The token cache."""

    def run(self) -> int:
        """Say that all is well; a damaged cache is a user error that names the files."""
        cache = _open(self.directory, "full")
        count = sum(len(shard.files) for shard in cache.manifest.shards)
        print(f"{self.directory}: {count:,} files of {len(cache.manifest.shards):,} shards are as they were written")
        return 0


@dataclasses.dataclass(frozen=True)
class Explain:
    """Print which documents a step's rows are made of, and where in them each piece begins and ends."""

    directory: Path
    """The token cache."""

    step: int = 0
    """Which step."""

    seq_len: int = 256
    """Inputs per row."""

    batch: int = 16
    """Rows per step."""

    seed: int = 0
    """The seed of the order."""

    packing: Literal["cut", "first_fit", "best_fit"] = "cut"
    """How documents fill rows."""

    row: int | None = None
    """Only this row of the batch."""

    part: Literal["all", "train", "validation"] = "all"
    """The whole cache, or one side of its split."""

    validation: float = 0.02
    """The share of the documents that the split gives to validation."""

    split_seed: int = 0
    """The seed of the split."""

    def run(self) -> int:
        """Print it; a bad option is a user error."""
        plan = self._plan()
        for number, pieces in self._rows(plan):
            print(f"\nrow {number}")
            for piece in pieces:
                print(f"  {piece}")
        return 0

    def _plan(self) -> "Plan":
        from dovetail_data.planning import Plan
        from dovetail_protocols import CommandError

        try:
            source = self._source(_open(self.directory, "sizes"))
            options: dict[str, Any] = {"seq_len": self.seq_len, "batch": self.batch, "packing": self.packing}
            return Plan(source, **options, seed=self.seed)
        except ValueError as error:
            raise CommandError(str(error)) from error

    def _rows(self, plan: "Plan") -> "list[tuple[int, tuple[Piece, ...]]]":
        from dovetail_protocols import CommandError

        try:
            rows = list(enumerate(plan.explain(self.step).rows))
            chosen = rows if self.row is None else [rows[range(self.batch)[self.row]]]
        except (ValueError, IndexError) as error:
            raise CommandError(str(error)) from error
        print(f"step {self.step} of {plan.fingerprint}")
        return chosen

    def _source(self, cache: "TokenCache") -> "TokenSource":
        if self.part == "all":
            return cache
        train, validation = cache.split(self.validation, seed=self.split_seed)
        return train if self.part == "train" else validation


@dataclasses.dataclass(frozen=True)
class Show(Explain):
    """Print the batch of a step: where each row comes from, its tokens, and its text where a tokenizer is given."""

    tokenizer: Path | None = None
    """A directory with a tokenizer.json, to print text (needs dovetail-data[show])."""

    def run(self) -> int:
        """Print it; a bad option is a user error."""
        plan = self._plan()
        rows = self._rows(plan)
        batch = plan.at(self.step)
        decode = None if self.tokenizer is None else _decoder(self.tokenizer)
        for number, pieces in rows:
            self._print_row(number, pieces, batch, decode)
        return 0

    def _print_row(self, number: int, pieces: "tuple[Piece, ...]", batch: Any, decode: Any) -> None:
        print(f"\nrow {number}: {int(batch.loss_weights[number].sum())} of {self.seq_len} targets count")
        tokens = [*batch.tokens[number].tolist(), int(batch.targets[number, -1])]
        for piece in pieces:
            print(f"  {piece}")
            ids = tokens[piece.column : piece.column + piece.stop - piece.start]
            print(f"    {decode(ids)!r}" if decode else f"    {' '.join(map(str, ids))}")


def _open(directory: Path, verify: Literal["sizes", "full"]) -> "TokenCache":
    from dovetail_data.cache import TokenCache
    from dovetail_protocols import CommandError

    try:
        return TokenCache.open(directory, verify=verify)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def _decoder(directory: Path) -> Any:
    from dovetail_protocols import CommandError

    path = directory / "tokenizer.json"
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
    except ModuleNotFoundError as error:
        raise CommandError(f"{error}; --tokenizer needs: pip install 'dovetail-data[show]'") from error
    except Exception as error:  # the library raises no narrower class
        raise CommandError(f"{path} cannot be read as a tokenizer ({error})") from error
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
