"""Waiting for a running save when the interpreter ends.

Once Python has begun to end, `concurrent.futures` takes no more work, and an Orbax save that is still running then
waits 20 minutes for itself. Functions given to `atexit` come too late. The list from which `concurrent.futures` itself
is ended is called last in, first out, so that a function added later still finds it working.
"""

import atexit
import importlib
import threading
from collections.abc import Callable

__all__ = ["before_shutdown"]


def before_shutdown(function: Callable[[], None]) -> None:
    """Call a function when the main thread has ended and other threads still work."""
    importlib.import_module("concurrent.futures.thread")  # so that it is on the list already
    getattr(threading, "_register_atexit", atexit.register)(function)
