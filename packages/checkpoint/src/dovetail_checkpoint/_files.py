"""Directories of a checkpoint root: listing, durable renames, quarantine, leftovers and the writer's lock.

A root holds committed steps (``100``), quarantined ones (``100.corrupt-1``), work in progress (``.tmp-...``) and
``.lock``. A step becomes visible, and vanishes, by one rename.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "WriterLock",
    "clean",
    "commit",
    "discard",
    "discard_quietly",
    "files_of",
    "leftovers",
    "new_staging",
    "quarantine",
    "quarantined",
    "set_aside",
    "steps",
    "sync",
    "sync_directories",
]

_LOG = logging.getLogger("dovetail_checkpoint")
_STEP = re.compile(r"0|[1-9][0-9]*")
_QUARANTINED = re.compile(r"(0|[1-9][0-9]*)\.corrupt-[0-9]+")
_TEMPORARY = ".tmp-"
# Tells this process's work in progress from what a killed one left; process ids repeat in containers.
_PROCESS = uuid.uuid4().hex[:12]


def steps(root: Path) -> list[int]:
    """Return the committed steps, ascending, as the directory lists them now; none when there is no directory."""
    try:
        with os.scandir(root) as entries:
            return sorted(int(e.name) for e in entries if _STEP.fullmatch(e.name) and e.is_dir())
    except FileNotFoundError:
        return []


def quarantined(root: Path) -> list[str]:
    """Return the names of the steps that were moved aside."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if _QUARANTINED.fullmatch(e.name) and e.is_dir())


def files_of(directory: Path) -> Iterator[str]:
    """Yield the files below a directory as paths relative to it with ``/``, in a fixed order.

    A file whose own name begins with a dot is left out: file systems and desktops put such files anywhere.
    """
    for folder, subfolders, names in os.walk(directory):
        subfolders.sort()
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(directory).as_posix()


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directories(directory: Path) -> None:
    """Flush a directory's entries and those of every directory below it."""
    for folder, _, _ in os.walk(directory, topdown=False):
        sync(Path(folder))


def new_staging(root: Path, step: int) -> Path:
    """Return the path, not yet made, of a directory in which a step is written before it is committed."""
    return root / f"{_TEMPORARY}{step}-{_PROCESS}-{uuid.uuid4().hex[:8]}"


def commit(staged: Path, final: Path) -> None:
    """Make a step visible: one rename, then the parent's entries are flushed.

    Raises:
        FileExistsError: the step exists.
    """
    if final.exists():
        raise FileExistsError(errno.EEXIST, "the step was committed by somebody else meanwhile", str(final))
    os.rename(staged, final)
    sync(final.parent)


def discard(path: Path) -> None:
    """Delete a step or a staging directory; a step is there in whole or not at all."""
    target = path
    if not path.name.startswith(_TEMPORARY):
        target = new_staging(path.parent, int(path.name))
        os.rename(path, target)
    shutil.rmtree(target)


def quarantine(root: Path, step: int) -> Path | None:
    """Move a step aside as ``<step>.corrupt-<n>``; None when it cannot be moved (read-only, or gone)."""
    source = root / str(step)
    n = 1
    while (target := root / f"{step}.corrupt-{n}").exists():
        n += 1
    try:
        os.rename(source, target)
    except OSError:
        return None
    return target


def set_aside(root: Path, step: int, error: Exception) -> None:
    """Quarantine a bad step and log which and why."""
    target = quarantine(root, step)
    where = f"it is now {target.name}" if target else "it could not be renamed"
    _LOG.warning("%s; %s; trying the step before it", error, where)


def discard_quietly(path: Path) -> None:
    """Delete a staging directory as far as possible; the rest goes at the next start."""
    shutil.rmtree(path, ignore_errors=True)


def leftovers(root: Path) -> list[Path]:
    """Return staging directories that are not this process's."""
    try:
        with os.scandir(root) as entries:
            return [Path(e.path) for e in entries if e.name.startswith(_TEMPORARY) and _PROCESS not in e.name]
    except FileNotFoundError:
        return []


def clean(root: Path) -> None:
    """Delete what killed processes left behind, unless a living process is saving into the root."""
    # The lock is refused when another process holds it, or when the directory is read-only.
    with contextlib.suppress(OSError), WriterLock(root):
        for path in leftovers(root):
            discard_quietly(path)


class WriterLock:
    """A lock on a root, held by one process at a time and freed when that process ends in whatever way.

    A POSIX record lock: a forked child does not inherit it, so an orphan of a killed trainer does not block the next.
    """

    def __init__(self, root: Path) -> None:
        """Take the lock.

        Raises:
            OSError: another process holds it, or the directory cannot be written.
        """
        self._file = open(root / ".lock", "a")  # noqa: SIM115
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise

    def release(self) -> None:
        """Give the lock back; twice does nothing."""
        self._file.close()

    def __enter__(self) -> "WriterLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
