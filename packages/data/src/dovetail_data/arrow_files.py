"""Rows of Parquet and Arrow files as documents."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from dovetail_data._errors import CorpusError
from dovetail_data.corpus import Document
from dovetail_data.files import File

__all__ = ["parquet_rows", "require_pyarrow", "saved_rows"]

_END = b"\xff\xff\xff\xff\0\0\0\0"  # pyarrow takes the end of the file for the end of the stream


def require_pyarrow(what: str) -> None:
    """Raise ModuleNotFoundError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401  # pyright: ignore[reportUnusedImport]  # found missing here, not later
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; {what} needs pyarrow: pip install 'dovetail-data[parquet]'") from error


def parquet_rows(file: File, column: str) -> Iterator[Document | None]:
    """Yield the rows of one Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with contextlib.ExitStack() as stack:
            source = file.path if file.system is None else stack.enter_context(file.open())
            reader = stack.enter_context(pyarrow.parquet.ParquetFile(source))
            _check_column(reader.schema_arrow, column, file)
            yield from _documents(reader.iter_batches(columns=[column]), column, file)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{file.where} cannot be read as Parquet ({error})") from error


def _check_column(schema: Any, column: str, file: File) -> None:
    """Raise CorpusError where a schema has no such column of strings."""
    import pyarrow

    kinds = [schema.field(column).type] if column in schema.names else []
    if not any(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) for kind in kinds):
        columns = {field.name: str(field.type) for field in schema}
        raise CorpusError(f"{file.where} has the columns {columns}; expected strings in {column!r}")


def _documents(batches: Any, column: str, file: File) -> Iterator[Document]:
    """Yield one document per row of record batches."""
    number = 0
    for batch in batches:
        for text in batch.column(column).to_pylist():
            if text is None:
                raise CorpusError(f"{file.where}, row {number} has no text in {column!r}; expected a string")
            yield Document(f"{file.name}:{number}", text)
            number += 1


def saved_rows(file: File, column: str) -> Iterator[Document | None]:
    """Yield the rows of one Arrow stream file."""
    import pyarrow
    import pyarrow.ipc

    try:
        with file.open() as stream:
            stream.seek(-len(_END), io.SEEK_END)
            if stream.read() != _END:
                raise CorpusError(f"{file.where} ends too early; expected a whole Arrow stream with its end mark")
            stream.seek(0)
            with pyarrow.ipc.open_stream(stream) as reader:
                _check_column(reader.schema, column, file)
                yield from _documents(_valid(reader, column), column, file)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{file.where} cannot be read as an Arrow stream ({error})") from error


def _valid(batches: Any, column: str) -> Iterator[Any]:
    """Check offsets and UTF-8 before anything is read through them: the format has no checksums."""
    for batch in batches:
        batch.column(column).validate(full=True)
        yield batch
