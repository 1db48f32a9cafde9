"""The files of a corpus: found under local paths and URLs, opened the same way.

Files of a directory come in the order of their relative names (compared as Unicode strings), those of a list in the
order of the list. Names that begin with a dot are left out of a directory. URLs go through fsspec; local paths do not
need it.
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast
from urllib.parse import urlsplit

from dovetail_data._errors import CorpusError
from dovetail_data.corpus import Corpus, Document

__all__ = ["File", "FileCorpus", "Paths", "find"]

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_BUFFER = 1 << 20


class File(NamedTuple):
    """One file.

    Attributes:
        name: what its documents are called after: its name relative to the directory that was given.
        path: where it is.
        system: the fsspec file system that `path` belongs to; None for a local file.
    """

    name: str
    path: str
    system: Any = None

    @property
    def where(self) -> str:
        """The path or URL, for people."""
        return self.path if self.system is None else self.system.unstrip_protocol(self.path)

    def open(self) -> io.BufferedIOBase:
        """Open it for reading; it seeks where its file system does."""
        if self.system is None:
            return open(self.path, "rb")
        return io.BufferedReader(_Remote(self), _BUFFER)

    @contextlib.contextmanager
    def local(self) -> Generator[str]:
        """Give a local path, for readers that know no other; of a remote file that of a copy."""
        if self.system is None:
            yield self.path
            return
        with tempfile.NamedTemporaryFile(suffix=Path(self.name).suffix) as copy:
            with self.open() as stream:
                shutil.copyfileobj(stream, copy, _BUFFER)
            copy.flush()
            yield copy.name


class _Remote(io.RawIOBase):
    """What fsspec opens, with errors that name the file whatever the transport raises."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._stream = self._named(lambda: file.system.open(file.path, "rb"))

    def _named(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            raise CorpusError(f"{self._file.where} cannot be read ({type(error).__name__}: {error})") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def readinto(self, buffer: Any) -> int:
        data = self._named(lambda: self._stream.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._named(lambda: self._stream.seek(offset, whence))

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        if not self.closed and hasattr(self, "_stream"):
            self._stream.close()
        super().close()


class FileCorpus(Corpus):
    """Files and a function that reads one as documents."""

    def __init__(self, files: Sequence[File], read: Callable[[File], Iterator[Document | None]]) -> None:
        self.files = files
        self._read = read

    def read(self) -> Iterator[Document | None]:
        """Yield the documents of one file after the other."""
        for file in self.files:
            yield from self._read(file)


def find(paths: Paths, suffixes: Sequence[str]) -> list[File]:
    """Return the named files, and those of the named directories that end with one of the suffixes.

    Raises:
        ValueError: `suffixes` is a string or holds an empty one.
        ModuleNotFoundError: a path is a URL, and fsspec or what it needs for such URLs is not installed.
        FileNotFoundError: a path does not exist.
        CorpusError: there is no such file.
    """
    if isinstance(suffixes, str) or not all(suffixes):
        raise ValueError(f"suffixes={suffixes!r}; expected a tuple of endings such as ('.txt', '.md')")
    roots = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[File] = []
    for root in roots:
        under = _under_url if _is_url(root) else _under
        found.extend(under(os.fspath(root), tuple(suffixes), alone=len(roots) == 1))
    if not found:
        raise CorpusError(f"no file with a suffix in {tuple(suffixes)} under {[str(root) for root in roots]}")
    return found


def _is_url(path: str | os.PathLike[str]) -> bool:
    return isinstance(path, str) and "://" in path


def _under(path: str, suffixes: tuple[str, ...], *, alone: bool) -> list[File]:
    root = Path(path)
    if root.is_file():
        return [File(root.name, str(root))]
    if not root.is_dir():
        hint = "; a URL must be a string, a Path loses one of its slashes" if ":/" in path else ""
        raise FileNotFoundError(f"{root} does not exist or is neither a file nor a directory{hint}")
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        kept = (Path(folder, name) for name in files if name.endswith(suffixes) and not name.startswith("."))
        names.extend(path.relative_to(root).as_posix() for path in kept if path.is_file())
    return [File(name if alone else f"{root.name}/{name}", str(root / name)) for name in sorted(names)]


def _under_url(url: str, suffixes: tuple[str, ...], *, alone: bool) -> list[File]:
    system, root = _system(url)
    try:
        kind = system.info(root)["type"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} does not exist or cannot be reached ({error})") from error
    if kind == "file" and not url.endswith("/"):
        return [File(_base(url), root, system)]
    paths = {path.removeprefix(root).lstrip("/"): path for path in cast("list[str]", system.find(root))}
    names = sorted(name for name in paths if name.endswith(suffixes) and not _is_hidden(name))
    return [File(name if alone else f"{_base(url)}/{name}", paths[name], system) for name in names]


def _system(url: str) -> tuple[Any, str]:
    try:
        import fsspec.core
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; {url} needs fsspec: pip install 'dovetail-data[fsspec]'") from error
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        kind = "http" if url.startswith("https:") else url.partition(":")[0]
        raise ModuleNotFoundError(f"{error}; for {url}: pip install 'fsspec[{kind}]'") from error


def _base(url: str) -> str:
    path = urlsplit(url).path if url.startswith(("http:", "https:")) else url  # "?" may be part of a key elsewhere
    return path.rstrip("/").rpartition("/")[2]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
