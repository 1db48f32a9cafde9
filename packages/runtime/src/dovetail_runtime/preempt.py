"""The preemption flag: SIGTERM asks a run to stop at a step on which all processes agree."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from dovetail_runtime._jaxcompat import distributed_settings, has_preemption_service

__all__ = ["PreemptionFlag", "preemption"]


class PreemptionFlag:
    """Whether the run should stop; made by `preemption`."""

    def __init__(self) -> None:
        self._requested = False
        self._agreed = False

    @property
    def requested(self) -> bool:
        """Whether this process knows of a request to stop.

        With several processes SIGTERM goes to jax's coordination service, and a request is known only once
        ``flag(step)`` has returned True; stop on that, not on this property.
        """
        return self._requested

    def request(self) -> None:
        """Ask to stop, as the signal does (with several processes: by sending SIGTERM to this process)."""
        if self._requested:
            return
        self._requested = True
        if _several() and has_preemption_service():
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, step: int) -> bool:
        """Tell whether to stop at `step`: the same answer on every process.

        Call it once per step on every process, with the same increasing steps. With several processes the agreed step
        is a few steps after the signal; from then on the answer stays True.

        Raises:
            ValueError: `step` is not an int >= 0.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"flag(step) got {step!r}; give the number of the step, an int >= 0")
        if not _several():
            return self._requested
        if not self._agreed:
            self._agreed = self._agree(step)
            self._requested |= self._agreed
        return self._agreed

    def _agree(self, step: int) -> bool:
        from jax.experimental import multihost_utils

        if has_preemption_service():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return bool(np.any(multihost_utils.process_allgather(np.array(self._requested))))


@contextlib.contextmanager
def preemption(*, sigint: bool = False) -> Generator[PreemptionFlag]:
    """Turn SIGTERM into a flag that the training loop reads; the old handlers come back at the end.

    ```
    with preemption() as flag:
        for step in range(steps):
            ...
            if flag(step):
                save(step)
                break
    ```

    With several processes enter it after `initialize`: jax's preemption service then owns SIGTERM and spreads the
    request, a signal to one process stops all at the same step, and nothing is installed for SIGTERM here. Where that
    service is off (JAX_ENABLE_PREEMPTION_SERVICE=0) every ``flag(step)`` gathers the flags of all processes instead.

    Args:
        sigint: also treat the first Ctrl-C as a request; the second raises KeyboardInterrupt.

    Raises:
        RuntimeError: not in the main thread, where Python cannot install signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("preemption() installs signal handlers, which Python allows only in the main thread")
    flag = PreemptionFlag()
    handlers: dict[signal.Signals, Callable[[int, Any], None]] = {}
    if not (_several() and has_preemption_service()):
        handlers[signal.SIGTERM] = lambda *_: flag.request()
    if sigint:
        handlers[signal.SIGINT] = lambda *_: _interrupt(flag)
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _several() -> bool:
    settings = distributed_settings()
    return settings is not None and settings[1] > 1


def _interrupt(flag: PreemptionFlag) -> None:
    if flag.requested:
        raise KeyboardInterrupt
    flag.request()
