"""A worker process: reads documents from its standard input, writes their tokens to its standard output.

It is a fresh interpreter that never imports the caller's main module, so that a worker costs what the tokenizer's own
module costs and no more. It ends when its input ends, hence also when the caller is killed.
"""

import os
import pickle
import signal
import sys
import traceback
from typing import Any, NamedTuple

from dovetail_data._errors import CacheError
from dovetail_data.tokenise import encode

__all__ = ["BOOTSTRAP", "Failure", "serve"]

BOOTSTRAP = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); import dovetail_data._worker as w; w.serve()"
)


class Failure(NamedTuple):
    """An exception on its way to the caller, who may not be able to unpickle the original."""

    message: str
    details: str
    is_cache_error: bool


def serve() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what an interrupt means
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # what a tokenizer prints must not mix with the replies
        encoder: Any = None
        while (request := _receive()) is not None:
            try:
                if encoder is None:
                    answer, encoder = None, pickle.loads(request)
                else:
                    answer = encode(encoder[0], request, encoder[1])
            except Exception as error:  # noqa: BLE001  # whatever a tokenizer raises belongs to the caller
                answer = Failure(f"{type(error).__name__}: {error}", traceback.format_exc(), _is_ours(error))
            pickle.dump(answer, replies, protocol=5)
            replies.flush()


def _receive() -> Any:
    try:
        return pickle.load(sys.stdin.buffer)
    except EOFError:
        return None


def _is_ours(error: Exception) -> bool:
    return isinstance(error, CacheError)
