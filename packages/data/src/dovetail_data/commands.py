"""The commands ``data.stats`` and ``data.show``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dovetail_data.cache import TokenCache
    from dovetail_data.tokens import TokenSource

__all__ = ["Show", "Stats"]

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
class Show:
    """Print the batch of a step: where each row comes from, its tokens, and its text where a tokenizer is given."""

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

    row: int | None = None
    """Only this row of the batch."""

    tokenizer: Path | None = None
    """A directory with a tokenizer.json, to print text (needs dovetail-data[show])."""

    part: Literal["all", "train", "validation"] = "all"
    """The whole cache, or one side of its split."""

    validation: float = 0.02
    """The share of the documents that the split gives to validation."""

    split_seed: int = 0
    """The seed of the split."""

    def run(self) -> int:
        """Print it; a bad option is a user error."""
        from dovetail_data.planning import Plan
        from dovetail_protocols import CommandError

        try:
            source = self._source(_open(self.directory, "sizes"))
            chosen = Plan(source, seq_len=self.seq_len, batch=self.batch, seed=self.seed)
            explanation, batch = chosen.explain(self.step), chosen.at(self.step)
            numbers = range(self.batch) if self.row is None else [range(self.batch)[self.row]]
        except (ValueError, IndexError) as error:
            raise CommandError(str(error)) from error
        decode = None if self.tokenizer is None else _decoder(self.tokenizer)
        print(f"step {self.step} of {chosen.fingerprint}")
        for number in numbers:
            self._print_row(number, explanation.rows[number], batch, decode)
        return 0

    def _source(self, cache: "TokenCache") -> "TokenSource":
        if self.part == "all":
            return cache
        train, validation = cache.split(self.validation, seed=self.split_seed)
        return train if self.part == "train" else validation

    def _print_row(self, number: int, pieces: Any, batch: Any, decode: Any) -> None:
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
