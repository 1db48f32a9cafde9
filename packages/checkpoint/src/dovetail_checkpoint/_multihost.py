"""What several processes need: one that decides, and all that hear it."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dovetail_checkpoint.errors import CorruptCheckpointError, TreeMismatchError

__all__ = ["decide", "is_primary"]

_ERRORS: dict[str, Callable[[str], Exception]] = {
    error.__name__: error
    for error in (CorruptCheckpointError, TreeMismatchError, FileNotFoundError, FileExistsError, ValueError, OSError)
}


def is_primary() -> bool:
    """Tell whether this process is the one that renames, deletes and writes manifests."""
    return jax.process_index() == 0


def decide(function: Callable[[], Any]) -> Any:
    """Call a function on process 0 and return its JSON result, or raise its error, on all processes.

    Called by all processes, on their main threads.
    """
    if jax.process_count() == 1:
        return function()
    result, failure = None, None
    if is_primary():
        try:
            result = function()
        except Exception as error:  # noqa: BLE001  (raised below, here as on the others)
            failure = error
    message = {"result": result, "error": failure and [type(failure).__name__, str(failure)]}
    heard = _broadcast(message)
    if failure is not None:
        raise failure
    if heard["error"]:
        name, text = heard["error"]
        raise _ERRORS.get(name, RuntimeError)(f"process 0: {text}")
    return heard["result"]


def _broadcast(message: Any) -> Any:
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(message).encode(), np.uint8) if is_primary() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(length, np.uint8)
    padded[: text.size] = text
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
