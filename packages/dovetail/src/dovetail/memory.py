"""Keep freed memory in the process, so that XLA's temporary buffer is not mapped anew at every step.

XLA on CPU allocates the temporary buffer of an execution with malloc. By default glibc maps such a block from the
kernel and gives it back afterwards, and every page of it faults at every step. An application may ask glibc to keep
its pages; a library must not, so this is called by commands only. A server gains nothing, and starts half as fast when
all its compiling threads wait for the one arena.
"""

import ctypes
import sys

__all__ = ["keep_pages"]

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -8, -4, -1, -2


def keep_pages() -> bool:
    """Tell glibc to keep freed memory; return whether it could (False on other C libraries)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    accepted = [mallopt(option, value) == 1 for option, value in wanted]
    return all(accepted)
