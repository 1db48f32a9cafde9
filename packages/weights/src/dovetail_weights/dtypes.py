"""The element types of safetensors files as NumPy dtypes."""

from typing import Any

import ml_dtypes
import numpy as np

from dovetail_weights.errors import WeightsError

__all__ = ["BY_CODE", "code_of", "is_float", "same_kind"]

BY_CODE: dict[str, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
"""Every element type of the format that fills whole bytes."""

_CODES = {dtype: code for code, dtype in BY_CODE.items()}


def code_of(dtype: Any) -> str:
    """Return the name that safetensors gives to a dtype.

    Raises:
        WeightsError: the format has no such type.
    """
    try:
        return _CODES[np.dtype(dtype).newbyteorder("=")]
    except (KeyError, TypeError):
        raise WeightsError(f"dtype {dtype} cannot be stored; safetensors has {', '.join(BY_CODE)}") from None


def is_float(dtype: Any) -> bool:
    """Whether a dtype is a floating-point type, the small ones of ml_dtypes included."""
    return np.dtype(dtype) in _FLOATS


_FLOATS = {dtype for code, dtype in BY_CODE.items() if code[0] in "FB" and code != "BOOL"}


def same_kind(a: Any, b: Any) -> bool:
    """Whether a cast between two dtypes keeps what the numbers mean: floats to floats, otherwise equal types."""
    return (is_float(a) and is_float(b)) or np.dtype(a) == np.dtype(b)
