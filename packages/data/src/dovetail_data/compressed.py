"""Compressed files, read from front to back; what is cut or damaged does not pass for a shorter file."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from dovetail_data._errors import CorpusError
from dovetail_data.files import File

__all__ = ["decompressed", "require_zstd"]

_GZIP = (".gz", ".tgz")
_ZSTD = (".zst",)
_INPUT = 1 << 16
_BUFFER = 1 << 18
_LONGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes


def require_zstd(files: Sequence[File]) -> None:
    """Raise ModuleNotFoundError where a file needs zstandard and it is not installed."""
    if not any(file.name.endswith(_ZSTD) for file in files):
        return
    try:
        import zstandard  # noqa: F401  # pyright: ignore[reportUnusedImport]  # found missing here, not later
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; .zst files need zstandard: pip install 'dovetail-data[zstd]'") from error


@contextlib.contextmanager
def decompressed(file: File) -> Generator[io.BufferedIOBase]:
    """Open a file, decompressed as its suffix says (``.gz``, ``.tgz``, ``.zst``).

    Raises:
        CorpusError: while it is read: it is damaged, or ends too early.
    """
    with file.open() as stream:
        if file.name.endswith(_ZSTD):
            yield io.BufferedReader(_Chunks(_unzstd(file, stream)), _BUFFER)
        elif file.name.endswith(_GZIP):
            try:
                with gzip.open(stream) as plain:
                    yield plain
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise CorpusError(f"{file.where} is damaged ({error}); expected a whole gzip file") from error
        else:
            yield stream


def _unzstd(file: File, stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Decompress frame by frame: zstandard's own reader takes the end of the file for the end of a frame."""
    import zstandard

    def frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj()

    current, fresh = frame(), False
    try:
        while data := stream.read(_INPUT):
            while data:
                yield current.decompress(data)
                fresh = current.eof
                data = current.unused_data
                current = frame() if fresh else current
    except zstandard.ZstdError as error:
        raise CorpusError(f"{file.where} is damaged ({error}); expected a whole zstd file") from error
    if not fresh:
        raise CorpusError(f"{file.where} is damaged (it ends within a frame); expected a whole zstd file")


class _Chunks(io.RawIOBase):
    """Pieces of bytes as a stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
