"""Tensors as jax arrays where they stand in a file: nothing is read, and nothing copied.

jax on a CPU takes memory over whose address is a multiple of 64. The axes keep the file's order, as the array's layout.
"""

from typing import Any

import jax
import numpy as np

from dovetail_weights.errors import WeightsError, listing
from dovetail_weights.header import ALIGNMENT
from dovetail_weights.reading import Directory

__all__ = ["check_alignment", "in_place"]


class _Lent:
    """A read-only array as one that DLPack exports: jax writes to no memory but its own."""

    def __init__(self, value: np.ndarray[Any, Any]) -> None:
        self._value = value
        self.__array_interface__ = {**value.__array_interface__, "data": (value.ctypes.data, False)}


def check_alignment(source: Directory) -> None:
    """Check that the files were written so that their tensors can be used in place.

    Raises:
        WeightsError: tensors begin elsewhere than at a multiple of 64 bytes; the message lists the files.
    """
    wrong = [f"{file.path}: {file.data_start}" for file in source.files.values() if file.data_start % ALIGNMENT]
    if wrong:
        raise WeightsError(
            f"mapped=True needs tensors from a multiple of {ALIGNMENT} bytes on, as save and write_directory put them; "
            f"write the checkpoint anew, or pass mapped=False. The first bytes of:{listing(wrong)}"
        )


def in_place(value: np.ndarray[Any, Any]) -> jax.Array | None:
    """Return a view of a file as an array on the CPU, or None where jax would have to copy it."""
    if not value.ndim or not value.size or value.flags.writeable or value.ctypes.data % ALIGNMENT:
        return None
    order = np.argsort([-stride for stride in value.strides], kind="stable")
    if not value.transpose(order).flags.c_contiguous:
        return None
    try:
        return jax.dlpack.from_dlpack(np.asarray(_Lent(value)), copy=False)
    except (BufferError, TypeError):  # a dtype that DLPack, or NumPy's of it, does not know
        return jax.device_put(value, jax.devices("cpu")[0]) if value.flags.c_contiguous else None
