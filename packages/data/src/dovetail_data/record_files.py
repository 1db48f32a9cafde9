"""ArrayRecord and Bagz files: records as documents."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from dovetail_data._errors import CorpusError
from dovetail_data.corpus import Corpus, Document
from dovetail_data.decoding import Undecodable, check_undecodable
from dovetail_data.files import File, FileCorpus, Paths, find

__all__ = ["ARRAY_RECORD", "BAGZ", "array_records", "bagz_records"]

ARRAY_RECORD = (".array_record", ".arrayrecord")
BAGZ = (".bagz",)
_BATCH = 1024  # records


def array_records(
    paths: Paths, *, decode: Callable[[bytes], str] = bytes.decode, undecodable: Undecodable = "error"
) -> Corpus:
    """Return a corpus with one document per record of ArrayRecord files (needs ``dovetail-data[array-record]``).

    Args:
        paths: a directory, a file, or a list of both; URLs need ``dovetail-data[fsspec]``, and such a file is copied to
            a temporary one while it is read.
        decode: makes the text of a record; a UnicodeDecodeError means that it is undecodable.
        undecodable: what to do with such a record.

    Raises:
        ModuleNotFoundError: array_record is not installed.
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a file is damaged, ends too early or is no ArrayRecord file.
    """
    check_undecodable(undecodable)
    try:
        import array_record.python.array_record_module  # noqa: F401  # pyright: ignore  # found missing here, not later
    except ModuleNotFoundError as error:
        text = f"{error}; ArrayRecord needs array_record: pip install 'dovetail-data[array-record]'"
        raise ModuleNotFoundError(text) from error

    return _corpus(find(paths, ARRAY_RECORD), _array_records, decode, undecodable)


def bagz_records(
    paths: Paths, *, decode: Callable[[bytes], str] = bytes.decode, undecodable: Undecodable = "error"
) -> Corpus:
    """Return a corpus with one document per record of Bagz files (needs ``dovetail-data[bagz]``).

    The format has no checksums: what is cut is an error, a flipped bit only where it makes a record undecodable.

    Args:
        paths: a directory, a file, or a list of both, ending with ``.bagz``; URLs as with `array_records`.
        decode: makes the text of a record; a UnicodeDecodeError means that it is undecodable.
        undecodable: what to do with such a record.

    Raises:
        ModuleNotFoundError: bagz is not installed.
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a file is empty, damaged, ends too early or is no Bagz file.
    """
    check_undecodable(undecodable)
    try:
        import bagz  # noqa: F401  # pyright: ignore  # found missing here, not later
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; Bagz needs bagz: pip install 'dovetail-data[bagz]'") from error
    return _corpus(find(paths, BAGZ), _bagz_records, decode, undecodable)


def _corpus(
    files: list[File],
    records: Callable[[File], Iterator[bytes]],
    decode: Callable[[bytes], str],
    undecodable: Undecodable,
) -> Corpus:
    def read(file: File) -> Iterator[Document | None]:
        for number, record in enumerate(records(file)):
            text = _text(record, f"{file.where}, record {number}", decode, undecodable)
            yield None if text is None else Document(f"{file.name}:{number}", text)

    return FileCorpus(files, read)


def _text(record: bytes, where: str, decode: Callable[[bytes], str], undecodable: Undecodable) -> str | None:
    try:
        return decode(record)
    except UnicodeDecodeError as error:
        if undecodable == "skip":
            return None
        raise CorpusError(f"{where} cannot be decoded ({error}); pass decode= or undecodable='skip'") from None


def _array_records(file: File) -> Iterator[bytes]:
    """Yield the records in batches of at least a group: the reader decompresses a group for each of its parts."""
    from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore[reportMissingTypeStubs]

    with file.local() as path:
        try:
            reader: Any = ArrayRecordReader(path)
            try:
                if not reader.ok():  # and yet it counts no records, without an error
                    raise CorpusError(f"{file.where} is damaged or not an ArrayRecord file; expected a whole one")
                count = reader.num_records()
                group = re.search(r"group_size:(\d+)", reader.writer_options_string() or "")
                batch = max(_BATCH, int(group[1]) if group else 0)
                for start in range(0, count, batch):
                    yield from reader.read(start, min(start + batch, count))
            finally:
                if reader.is_open():
                    reader.close()
        except CorpusError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorpusError(f"{file.where} is damaged ({error}); expected a whole ArrayRecord file") from error


def _bagz_records(file: File) -> Iterator[bytes]:
    import bagz  # pyright: ignore

    with file.local() as path:
        if not os.path.getsize(path):
            raise CorpusError(f"{file.where} is empty; expected a whole Bagz file")
        try:
            reader: Any = bagz.Reader(path)
            for start in range(0, len(reader), _BATCH):
                yield from reader.read_range(start, min(_BATCH, len(reader) - start))
        except CorpusError:
            raise
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise CorpusError(f"{file.where} is damaged ({error}); expected a whole Bagz file") from error
