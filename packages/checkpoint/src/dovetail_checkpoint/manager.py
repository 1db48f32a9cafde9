"""Manager: asynchronous saves that appear by one rename, restores that check what they read.

A save runs in two parts. On the caller's thread values are taken, the data position and the metadata become text.
In the background (`_commit`) the arrays are written and digested, and one rename makes the step visible.
"""

import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from dovetail_checkpoint import _files, _json
from dovetail_checkpoint._commit import Job, finish
from dovetail_checkpoint._exit import before_shutdown, give_up
from dovetail_checkpoint.errors import CorruptCheckpointError
from dovetail_checkpoint.keep import Policy, latest
from dovetail_checkpoint.manifest import verify as verify_step

if TYPE_CHECKING:
    from dovetail_protocols import Restored

__all__ = ["Manager"]

_LOG = logging.getLogger("dovetail_checkpoint")
_KEEP = latest(3)


class Manager:
    """Saves and restores the steps below one directory; meets `dovetail_protocols.Checkpointer`.

    One process (of a multi-process run: process 0) may save into a directory at a time; any number may read it.
    The directory is a local or shared POSIX file system. Use it as a context manager, or call `close`, so that the
    last save is committed and its errors are seen.

    Args:
        path: the directory; it is made at the first save.
        keep: which steps stay, see `latest`, `every`, `best`, `all_steps`; joined with ``|``. The newest step always
            stays. Steps are deleted after the commit of a new one.
        verify: what `restore` checks first: ``full`` the digest of every byte, ``sizes`` the names and sizes of the
            files, ``off`` the manifest alone.
        on_corrupt: when the newest step is bad, ``previous`` warns, renames it to ``<step>.corrupt-<n>`` and goes on
            with the one before it; ``error`` raises.
        compress: compress arrays with zstd; on float weights this saves little and costs much time.

    Raises:
        ValueError: an option has an unknown value.
        NotADirectoryError: `path` is a file.

    Example:
        >>> import tempfile, numpy as np
        >>> with Manager(tempfile.mkdtemp()) as checkpoints:
        ...     checkpoints.save(1, {"w": np.arange(3)}, meta={"note": "first"})
        ...     checkpoints.wait()
        ...     step, state, meta = checkpoints.restore()
        >>> step, state["w"].tolist(), meta
        (1, [0, 1, 2], {'note': 'first'})
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: Policy = _KEEP,
        verify: Literal["full", "sizes", "off"] = "full",
        on_corrupt: Literal["previous", "error"] = "previous",
        compress: bool = False,
        _fault: Callable[[str], None] | None = None,
    ) -> None:
        _one_of("verify", verify, ("full", "sizes", "off"))
        _one_of("on_corrupt", on_corrupt, ("previous", "error"))
        if not isinstance(keep, Policy):
            raise ValueError(f"keep={keep!r}; expected a policy such as latest(3) or all_steps()")
        if "://" in str(path):
            raise ValueError(f"path={str(path)!r}; expected a directory of a POSIX file system, not a URL")
        self.path = Path(path).absolute()
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"path={str(path)!r} is not a directory")
        self._keep = keep
        self._verify: Literal["full", "sizes", "off"] = verify
        self._on_corrupt = on_corrupt
        self._compress = compress
        self._fault = _fault
        self._lock: _files.WriterLock | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._exit_is_set = False
        self._metrics: dict[int, Mapping[str, float]] = {}
        if _files.leftovers(self.path) and _primary():
            _files.clean(self.path)

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Any = None,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save a step; return when the values are taken, which is before they are written.

        The arrays may be donated, deleted or overwritten right after. A save that is still running is waited for
        first, and what it raised is raised here (nothing is saved then). With several processes, all call it.

        Args:
            step: not negative, and not saved yet.
            state: a pytree of jax and NumPy arrays (typed random keys and low-precision dtypes included), Python
                numbers and None.
            data: a loader; its ``get_state()`` is called now and goes into the same step.
            meta: a dict of JSON values, given back by `restore`.
            metrics: numbers by name, for `best`. NaN is allowed.

        Raises:
            ValueError: the step exists, or a leaf, `meta` or the data position cannot be stored.
            TypeError: a leaf, `meta` or the data position has a type that cannot be stored.
            RuntimeError: the manager is closed, or another process is saving into the directory.
            Exception: what the previous save raised in the background.
        """
        from dovetail_checkpoint import _multihost, _orbax, _tree

        if self._closed:
            raise RuntimeError(f"the manager of {self.path} is closed; make a new one")
        self.wait()
        number = _number(step)
        leaves, arrays = _tree.encode(state)
        texts = _texts(data, meta, metrics)
        staging = Path(_multihost.decide(lambda: str(self._begin(number))))
        job = Job(step=number, root=self.path, staging=staging, leaves=leaves, **texts)
        try:
            pending = _orbax.save_async(job.written, _orbax.nest(arrays), compress=self._compress)
        except BaseException:
            if _multihost.is_primary():
                _files.discard_quietly(staging)
            raise
        self._wait_at_exit()
        self._thread = threading.Thread(target=self._finish, args=(job, pending), name=f"save-{number}")
        self._thread.start()

    def _begin(self, step: int) -> Path:
        """On process 0: take the lock, check the step and make its staging directory."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            try:
                self._lock = _files.WriterLock(self.path)
            except BlockingIOError:
                raise RuntimeError(f"another process is saving into {self.path}; stop it or use another path") from None
        if (self.path / str(step)).exists():
            raise ValueError(f"step={step} has been saved in {self.path}; save a new step or move the old one away")
        staging = _files.new_staging(self.path, step)
        staging.mkdir()
        return staging

    def _wait_at_exit(self) -> None:
        if self._exit_is_set:
            return
        self._exit_is_set = True
        reference = weakref.ref(self)

        def finish() -> None:
            manager = reference()
            if manager is not None:
                manager._join()
                if manager._error is not None:
                    _LOG.error("a save failed and nobody waited for it; call close()", exc_info=manager._error)
                    give_up()

        before_shutdown(finish)

    def _finish(self, job: Job, pending: Any) -> None:
        try:
            finish(job, pending, self._keep, self._metrics, self._fault or _no_fault)
        except BaseException as error:  # noqa: BLE001  (raised by the next call)
            self._error = error

    def restore(self, like: Any = None, *, data: Any = None, step: int | None = None) -> "Restored":
        """Restore a step, by default the newest good one. With several processes, all call it.

        A running save is waited for first; what it raised stays for the next `save`, `wait` or `close`.

        Args:
            like: a pytree of arrays or ``jax.ShapeDtypeStruct`` that says what each leaf becomes: jax arrays in the
                given sharding (any mesh and number of devices; without a sharding, or like an uncommitted array, on the
                default device and uncommitted), NumPy arrays, Python numbers, typed keys. Leaves are matched by
                address, so containers may be of other types than those saved. None restores nested dicts of NumPy
                arrays, Python numbers and typed keys; containers without leaves are not in them.
            data: a loader; its ``set_state`` is called with the saved position, after the state was read.
            step: this step and no other; a bad one raises.

        Raises:
            FileNotFoundError: there is no such step.
            TreeMismatchError: the saved tree differs from `like` (a ValueError); names the leaves and both values.
            CorruptCheckpointError: the step, or every step, is bad (a ValueError); names the file.
            ValueError: `data` is given but the step has no data position.
        """
        from dovetail_checkpoint import _multihost, _restore
        from dovetail_protocols import Restored

        self._join()
        explicit = None if step is None else _number(step)
        on_corrupt = "error" if explicit is not None else self._on_corrupt
        below = math.inf
        while True:
            number: int = _multihost.decide(
                lambda below=below: _restore.choose(self.path, explicit, self._verify, on_corrupt, below)
            )
            try:
                state, manifest, position = _restore.load(self.path / str(number), like, data is not None)
                break
            except Exception as error:
                if self._verify == "full":
                    raise
                self._after_failed_load(number, on_corrupt, error)
                below = number
        if data is not None:
            data.set_state(position)
        return Restored(step=number, state=state, meta=manifest.meta)

    def _after_failed_load(self, number: int, on_corrupt: str, error: Exception) -> None:
        """Return to try the previous step if damage that a weak verification let pass explains the error."""
        try:
            verify_step(self.path / str(number), "full")
        except CorruptCheckpointError as corrupt:
            if on_corrupt == "error" or not _alone():
                raise corrupt from error
            _files.set_aside(self.path, number, corrupt)
            return
        raise error

    def steps(self) -> list[int]:
        """Return the committed steps, ascending, as the directory lists them now."""
        return _files.steps(self.path)

    def latest_step(self) -> int | None:
        """Return the largest committed step, or None; its bytes are not looked at."""
        return max(self.steps(), default=None)

    def wait(self) -> None:
        """Return when every save is committed; raise what one of them raised (once)."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait, then release the directory. `save` raises afterwards, `restore` goes on working."""
        self._closed = True
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> "Manager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            _LOG.exception("a save failed while another error was on its way")


def _no_fault(stage: str) -> None:
    del stage


def _primary() -> bool:
    from dovetail_checkpoint import _multihost

    return _multihost.is_primary()


def _alone() -> bool:
    import jax

    return jax.process_count() == 1


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}")


def _number(step: Any) -> int:
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step={step!r} is a {type(step).__name__}; expected an integer")
    if (number := step.__index__()) < 0:
        raise ValueError(f"step={number}; expected 0 or more")
    return number


def _texts(data: Any, meta: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    if meta is not None and not isinstance(meta, Mapping):
        raise TypeError(f"meta is a {type(meta).__name__}; expected a dict of JSON values")
    numbers: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"metrics[{name!r}] is {value!r}; expected a number") from None
    return {
        "data": None if data is None else _json.checked_dumps("data.get_state()", data.get_state()),
        "meta": _json.checked_dumps("meta", dict(meta or {})),
        "metrics": numbers,
    }
