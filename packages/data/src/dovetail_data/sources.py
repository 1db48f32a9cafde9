"""Corpora on disk or behind URLs: text files, JSON lines and Parquet."""

import os
from collections.abc import Callable, Iterator, Sequence

from dovetail_data._errors import CorpusError
from dovetail_data.arrow_files import parquet_rows, require_pyarrow
from dovetail_data.compressed import decompressed, require_zstd
from dovetail_data.corpus import Corpus, Document, concatenate
from dovetail_data.decoding import Undecodable, check_undecodable, decode, json_field
from dovetail_data.files import File, FileCorpus, Paths, find
from dovetail_data.hf_files import ARROW, hf_dataset
from dovetail_data.record_files import ARRAY_RECORD, BAGZ, array_records, bagz_records
from dovetail_data.tar_files import TAR, webdataset

__all__ = ["TEXT_SUFFIXES", "jsonl", "open_corpus", "parquet", "text_files"]

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
_PARQUET = (".parquet",)


def text_files(paths: Paths, *, suffixes: Sequence[str] = TEXT_SUFFIXES, undecodable: Undecodable = "error") -> Corpus:
    """Return a corpus with one document per UTF-8 file, its text unchanged.

    Args:
        paths: a directory, a file, or a list of both; URLs need ``dovetail-data[fsspec]``. Files named here are read
            whatever their suffix.
        suffixes: which files of a directory to read.
        undecodable: what to do with a file that is not UTF-8: raise an error, or leave it out and count it in
            ``corpus.summary.skipped``.

    Raises:
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a file is not UTF-8.
    """
    return files_as_text(find(paths, suffixes), undecodable)


def files_as_text(files: list[File], undecodable: Undecodable = "error") -> Corpus:
    """Return a corpus with one document per named file (see `text_files`)."""
    check_undecodable(undecodable)

    def read(file: File) -> Iterator[Document | None]:
        with file.open() as stream:
            text = decode(stream.read(), file.where, undecodable)
        yield None if text is None else Document(file.name, text)

    return FileCorpus(files, read)


def jsonl(paths: Paths, *, field: str = "text", undecodable: Undecodable = "error") -> Corpus:
    """Return a corpus with one document per line of JSON-lines files.

    They end with ``.jsonl`` or ``.ndjson``, also ``.gz`` and ``.zst`` (needs ``dovetail-data[zstd]``).

    Args:
        paths: a directory, a file, or a list of both; URLs need ``dovetail-data[fsspec]``.
        field: the field that holds the text. Blank lines are left out.
        undecodable: what to do with a line that is not UTF-8 or holds half a surrogate pair.

    Raises:
        ModuleNotFoundError: a file ends with ``.zst`` and zstandard is not installed.
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a line is not a JSON object with a string in `field`, or a
            compressed file is damaged.
    """
    check_undecodable(undecodable)

    def read(file: File) -> Iterator[Document | None]:
        with decompressed(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    text = json_field(line, field, f"{file.where}, line {number}", undecodable)
                    yield None if text is None else Document(f"{file.name}:{number}", text)

    files = find(paths, _JSONL)
    require_zstd(files)
    return FileCorpus(files, read)


def parquet(paths: Paths, *, column: str = "text") -> Corpus:
    """Return a corpus with one document per row of Parquet files (needs ``dovetail-data[parquet]``).

    Args:
        paths: a directory, a file, or a list of both; URLs need ``dovetail-data[fsspec]``.
        column: the string column that holds the text.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a file is damaged, or has no such column of strings, or a null.
    """
    require_pyarrow("Parquet")
    return FileCorpus(find(paths, _PARQUET), lambda file: parquet_rows(file, column))


def open_corpus(
    *paths: str | os.PathLike[str], suffixes: Sequence[str] = TEXT_SUFFIXES, undecodable: Undecodable = "error"
) -> Corpus:
    """Return the corpus that files, directories and URLs hold, each file read as its suffix says.

    JSON lines, Parquet and datasets saved on disk are read from the field or column ``text``, WebDataset shards from
    the extension ``txt``. The formats of a directory follow one another: text, JSON lines, Parquet, a saved dataset,
    WebDataset shards, ArrayRecord, Bagz. A file with any other suffix is text.

    Raises:
        FileNotFoundError: a path does not exist.
        CorpusError: no path is given, or a directory holds nothing to read.
    """
    if not paths:
        raise CorpusError("no paths were given; expected at least one file or directory")
    return concatenate(*(part for path in paths for part in _parts(path, suffixes, undecodable)))


def _parts(path: str | os.PathLike[str], suffixes: Sequence[str], undecodable: Undecodable) -> Iterator[Corpus]:
    formats: dict[tuple[str, ...], Callable[[], Corpus]] = {
        _JSONL: lambda: jsonl(path, undecodable=undecodable),
        _PARQUET: lambda: parquet(path),
        ARROW: lambda: hf_dataset(path),
        TAR: lambda: webdataset(path, undecodable=undecodable),
        ARRAY_RECORD: lambda: array_records(path, undecodable=undecodable),
        BAGZ: lambda: bagz_records(path, undecodable=undecodable),
    }
    special = tuple(suffix for group in formats for suffix in group)
    names = [file.name for file in find(path, (*suffixes, *special))]
    if not all(name.endswith(special) for name in names):
        yield text_files(path, suffixes=suffixes, undecodable=undecodable)
    for group, corpus in formats.items():
        if any(name.endswith(group) for name in names):
            yield corpus()
