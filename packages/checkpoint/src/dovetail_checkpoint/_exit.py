"""Waiting for a running save when the interpreter ends.

Once Python has begun to end, `concurrent.futures` takes no more work, and an Orbax save that is still running then
waits 20 minutes for itself. Functions given to `atexit` come too late. The list from which `concurrent.futures` itself
is ended is called last in, first out, so that a function added later still finds it working.

Python 3.12, alone among the versions, starts no thread from there on, and Orbax needs new ones all along: a save that
is still running fails. What is left of it would keep the process for those 20 minutes, so it is ended at once.
"""

import atexit
import importlib
import os
import sys
import threading
from collections.abc import Callable

__all__ = ["before_shutdown", "give_up"]

THREADS_START_AT_EXIT = sys.version_info[:2] != (3, 12)


def before_shutdown(function: Callable[[], None]) -> None:
    """Call a function when the main thread has ended and other threads still work."""
    importlib.import_module("concurrent.futures.thread")  # so that it is on the list already
    getattr(threading, "_register_atexit", atexit.register)(function)


def give_up() -> None:
    """After a save failed at the end of the interpreter: on Python 3.12 end the process with status 1."""
    if not THREADS_START_AT_EXIT:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
