"""The corpus that every machine with Python has: the sources of the standard library."""

import os
import sysconfig
from pathlib import Path

from dovetail_data._errors import CorpusError
from dovetail_data.corpus import Corpus
from dovetail_data.files import File
from dovetail_data.sources import files_as_text

__all__ = ["python_corpus"]

_FOLDERS = {
    *("test", "tests", "idle_test"),  # tests
    *("encodings", "pydoc_data", "__phello__"),  # tables and generated text
    *("site-packages", "dist-packages", "__pycache__"),  # not the standard library
}
_TABLES = {"html/entities.py", "re/_casefix.py", "msilib/schema.py", "msilib/sequence.py"}
_LEAST_BYTES = 1_000_000


def python_corpus(root: str | os.PathLike[str] | None = None) -> Corpus:
    """Return the ``.py`` files of the standard library, one document per file, in the order of their names.

    Tests, tables (``encodings``, ``pydoc_data``, ``html/entities.py`` and the like), what the build recorded about the
    machine, installed packages and empty files are left out. About 10 MB; the text depends on the Python version.

    Args:
        root: where to look, by default the directory that `sysconfig` names.

    Raises:
        CorpusError: the distribution ships no sources (less than 1 MB was found).
    """
    where = Path(sysconfig.get_path("stdlib") if root is None else root)
    files = [File(name, str(where / name)) for name in _names(where)]
    size = sum(os.stat(file.path).st_size for file in files)
    if size < _LEAST_BYTES:
        raise CorpusError(
            f"found {size} bytes of Python sources in {where}; expected at least {_LEAST_BYTES}. This distribution "
            "ships no sources: install its development or full package, or pass a corpus of your own"
        )
    return files_as_text(files)


def _names(root: Path) -> list[str]:
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _FOLDERS and not name.startswith(("config-", "."))]
        names.extend(Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py"))
    return sorted(name for name in names if _wanted(name, root))


def _wanted(name: str, root: Path) -> bool:
    return name not in _TABLES and not name.startswith("_sysconfig") and (root / name).stat().st_size > 0
