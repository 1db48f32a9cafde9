"""Corpora on disk: text files, JSON lines and Parquet.

Files of a directory come in the order of their relative names (compared as Unicode strings), those of a list in the
order of the list. Names that begin with a dot are left out of a directory.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dovetail_data._errors import CorpusError
from dovetail_data.corpus import Corpus, Document, concatenate

__all__ = ["TEXT_SUFFIXES", "Undecodable", "jsonl", "open_corpus", "parquet", "text_files"]

Undecodable: TypeAlias = Literal["error", "skip"]
Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
File: TypeAlias = tuple[str, Path]  # the name for people, and where it is

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_JSONL = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_PARQUET = (".parquet",)


class _Files(Corpus):
    """Files and a function that reads one as documents."""

    def __init__(self, files: list[File], read: Callable[[File], Iterator[Document | None]]) -> None:
        self.files = files
        self._read = read

    def read(self) -> Iterator[Document | None]:
        for file in self.files:
            yield from self._read(file)


def text_files(paths: Paths, *, suffixes: Sequence[str] = TEXT_SUFFIXES, undecodable: Undecodable = "error") -> Corpus:
    """Return a corpus with one document per UTF-8 file, its text unchanged.

    Args:
        paths: a directory, a file, or a list of both. Files named here are read whatever their suffix.
        suffixes: which files of a directory to read.
        undecodable: what to do with a file that is not UTF-8: raise an error, or leave it out and count it in
            ``corpus.summary.skipped``.

    Raises:
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a file is not UTF-8.
    """
    return files_as_text(_find(paths, suffixes), undecodable)


def files_as_text(files: list[File], undecodable: Undecodable = "error") -> Corpus:
    """Return a corpus with one document per named file (see `text_files`)."""
    _check_undecodable(undecodable)

    def read(file: File) -> Iterator[Document | None]:
        name, path = file
        text = _decode(path.read_bytes(), str(path), undecodable)
        yield None if text is None else Document(name, text)

    return _Files(files, read)


def jsonl(paths: Paths, *, field: str = "text", undecodable: Undecodable = "error") -> Corpus:
    """Return a corpus with one document per line of JSON-lines files (``.jsonl`` or ``.ndjson``, also ``.gz``).

    Args:
        paths: a directory, a file, or a list of both.
        field: the field that holds the text. Blank lines are left out.
        undecodable: what to do with a line that is not UTF-8 or holds half a surrogate pair.

    Raises:
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a line is not a JSON object with a string in `field`, or a
            compressed file is damaged.
    """
    _check_undecodable(undecodable)

    def read(file: File) -> Iterator[Document | None]:
        name, path = file
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                text = _field(line, field, f"{path}, line {number}", undecodable)
                yield None if text is None else Document(f"{name}:{number}", text)

    return _Files(_find(paths, _JSONL), read)


def parquet(paths: Paths, *, column: str = "text") -> Corpus:
    """Return a corpus with one document per row of Parquet files (needs ``dovetail-data[parquet]``).

    Args:
        paths: a directory, a file, or a list of both.
        column: the string column that holds the text.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a file is damaged, or has no such column of strings, or a null.
    """
    try:
        import pyarrow.parquet  # noqa: F401  # pyright: ignore[reportUnusedImport]  # found missing here, not later
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; Parquet needs pyarrow: pip install 'dovetail-data[parquet]'") from error

    return _Files(_find(paths, _PARQUET), lambda file: _rows(file, column))


def open_corpus(
    *paths: str | os.PathLike[str], suffixes: Sequence[str] = TEXT_SUFFIXES, undecodable: Undecodable = "error"
) -> Corpus:
    """Return the corpus that files and directories hold, each file read as its suffix says.

    JSON lines and Parquet are read from the field or column ``text``; of a directory, first its text files, then its
    JSON lines, then its Parquet files. A file with any other suffix is text.

    Raises:
        FileNotFoundError: a path does not exist.
        CorpusError: no path is given, or a directory holds nothing to read.
    """
    if not paths:
        raise CorpusError("no paths were given; expected at least one file or directory")
    return concatenate(*(part for path in paths for part in _parts(Path(path), suffixes, undecodable)))


def _parts(path: Path, suffixes: Sequence[str], undecodable: Undecodable) -> list[Corpus]:
    names = [name for name, _ in _find(path, (*suffixes, *_JSONL, *_PARQUET))]
    text = [n for n in names if not n.endswith((*_JSONL, *_PARQUET))]
    parts: list[Corpus] = []
    if text:
        parts.append(text_files(path, suffixes=suffixes, undecodable=undecodable))
    if any(name.endswith(_JSONL) for name in names):
        parts.append(jsonl(path, undecodable=undecodable))
    if any(name.endswith(_PARQUET) for name in names):
        parts.append(parquet(path))
    return parts


def _find(paths: Paths, suffixes: Sequence[str]) -> list[File]:
    if isinstance(suffixes, str) or not all(suffixes):
        raise ValueError(f"suffixes={suffixes!r}; expected a tuple of endings such as ('.txt', '.md')")
    roots = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    found = [file for root in roots for file in _under(root, tuple(suffixes), alone=len(roots) == 1)]
    if not found:
        raise CorpusError(f"no file with a suffix in {tuple(suffixes)} under {[str(root) for root in roots]}")
    return found


def _under(root: Path, suffixes: tuple[str, ...], *, alone: bool) -> list[File]:
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist or is neither a file nor a directory")
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        kept = (Path(folder, name) for name in files if name.endswith(suffixes) and not name.startswith("."))
        names.extend(path.relative_to(root).as_posix() for path in kept if path.is_file())
    return [(name if alone else f"{root.name}/{name}", root / name) for name in sorted(names)]


def _check_undecodable(value: str) -> None:
    if value not in ("error", "skip"):
        raise ValueError(f"undecodable={value!r}; expected 'error' or 'skip'")


def _decode(data: bytes, where: str, undecodable: Undecodable) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if undecodable == "skip":
            return None
        raise CorpusError(f"{where} is not UTF-8 ({error}); convert it, or pass undecodable='skip'") from None


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
            yield from stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path} is damaged ({error}); expected a whole gzip file") from error


def _field(line: bytes, field: str, where: str, undecodable: Undecodable) -> str | None:
    decoded = _decode(line, where, undecodable)
    if decoded is None:
        return None
    try:
        value: Any = json.loads(decoded)
    except ValueError as error:
        raise CorpusError(f"{where} is not JSON ({error}): {decoded.strip()!r:.80}") from None
    except RecursionError:
        raise CorpusError(f"{where} is nested too deeply: {decoded.strip()!r:.80}") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise CorpusError(f"{where} is {decoded.strip()!r:.80}; expected an object with a string in {field!r}")
    text: str = value[field]
    try:
        text.encode()
    except UnicodeEncodeError:
        if undecodable == "skip":
            return None
        raise CorpusError(
            f"{where} holds half a surrogate pair in {field!r}; mend it, or pass undecodable='skip'"
        ) from None
    return text


def _rows(file: File, column: str) -> Iterator[Document | None]:
    import pyarrow
    import pyarrow.parquet

    name, path = file
    try:
        with pyarrow.parquet.ParquetFile(path) as reader:
            schema = reader.schema_arrow
            kinds = [schema.field(column).type] if column in schema.names else []
            if not any(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) for kind in kinds):
                raise CorpusError(f"{path} has the columns {_describe(schema)}; expected strings in {column!r}")
            number = 0
            for batch in reader.iter_batches(columns=[column]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise CorpusError(f"{path}, row {number} has no text in {column!r}; expected a string")
                    yield Document(f"{name}:{number}", text)
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as Parquet ({error})") from error


def _describe(schema: Any) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}
