"""WebDataset shards: tar files whose members share a name up to the first dot.

The standard library takes a header that is cut or damaged for the end of an archive; here an archive ends with the
block of zeros that says so.
"""

import io
import tarfile
from collections.abc import Iterator
from tarfile import (
    EOFHeaderError,  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs
    HeaderError,
    ReadError,
)
from typing import Any

from dovetail_data._errors import CorpusError
from dovetail_data.compressed import decompressed, require_zstd
from dovetail_data.corpus import Corpus, Document
from dovetail_data.decoding import Undecodable, check_undecodable, decode, json_field
from dovetail_data.files import File, FileCorpus, Paths, find

__all__ = ["TAR", "webdataset"]

TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_BUFFER = 1 << 16


def webdataset(
    paths: Paths, *, field: str = "txt", json_key: str = "text", undecodable: Undecodable = "error"
) -> Corpus:
    """Return a corpus with one document per sample of WebDataset tar shards, also ``.tar.gz`` and ``.tar.zst``.

    A sample is the neighbouring files that share a name up to its first dot; what follows is the extension, in lower
    case. Names without an extension or with nothing before it, and those like ``__this__``, are left out.

    Args:
        paths: a directory, a file, or a list of both; URLs need ``dovetail-data[fsspec]``.
        field: the extension of the file that holds the text.
        json_key: where the extension is ``json`` or ends with ``.json``, the field of its object that holds the text.
        undecodable: what to do with a text that is not UTF-8 or holds half a surrogate pair.

    Raises:
        ModuleNotFoundError: a file ends with ``.zst`` and zstandard is not installed.
        FileNotFoundError: a path does not exist.
        CorpusError: no file matches; while iterating: a shard is damaged or ends too early, or a sample has no such
            file, or two.
    """
    check_undecodable(undecodable)

    def text(data: bytes, where: str) -> str | None:
        if field == "json" or field.endswith(".json"):
            return json_field(data, json_key, where, undecodable)
        return decode(data, where, undecodable)

    def read(file: File) -> Iterator[Document | None]:
        for key, name, data in _samples(file, field):
            found = text(data, f"{file.where}, member {name}")
            yield None if found is None else Document(f"{file.name}:{key}", found)

    files = find(paths, TAR)
    require_zstd(files)
    return FileCorpus(files, read)


def _samples(file: File, field: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield key, name and content of the one member of each sample whose extension is `field`."""
    current, extensions = "", [field]

    def check() -> None:
        if extensions.count(field) != 1:
            raise CorpusError(f"{file.where}, sample {current} has files {extensions}; expected one that is {field!r}")

    with decompressed(file) as stream:
        for name, data in _members(file, stream, f".{field}"):
            key, extension = _split(name)
            if not key:
                continue
            if key != current:
                check()
                current, extensions = key, []
            extensions.append(extension)
            if extension == field:
                check()
                yield key, name, data
    check()


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    left_out = not stem or not extension or (base.startswith("__") and base.endswith("__"))
    return ("", "") if left_out else (f"{folder}{slash}{stem}".removeprefix("./"), extension.lower())


def _members(file: File, stream: io.BufferedIOBase, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yield the regular files of an archive, with the content of those whose name ends with `suffix`."""
    try:
        with tarfile.open(
            fileobj=stream,
            mode="r|",
            tarinfo=_Header,
            encoding="utf-8",
            errors="backslashreplace",  # any name stays readable and itself
        ) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it keeps them all
                if member.isfile():
                    wanted = member.name.lower().endswith(suffix)
                    content = archive.extractfile(member) if wanted else None
                    yield member.name, b"" if content is None else content.read()
        while stream.read(_BUFFER):  # to the checksum of a compressed archive
            pass
    except tarfile.TarError as error:
        raise CorpusError(f"{file.where} is damaged ({error}); expected a whole tar file") from error


class _Header(tarfile.TarInfo):
    """A header whose absence is an error."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # the block of zeros
            raise
        except HeaderError as error:
            raise ReadError(str(error)) from error
