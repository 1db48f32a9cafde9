import math

import ml_dtypes
import numpy as np
import pytest

CODES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def make(dtype, shape, seed=0):
    """Random bits (0 or 1 for bool), so that every value of the type occurs."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype) == np.bool_:
        return random.integers(0, 2, shape).astype(np.bool_)
    raw = random.integers(0, 256, math.prod(shape) * np.dtype(dtype).itemsize, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.fixture(scope="session")
def every_dtype():
    tensors = {f"{code}.{i}": make(d, s) for code, d in CODES.items() for i, s in enumerate([(3, 5), (), (0, 4), (7,)])}
    return tensors


@pytest.fixture(scope="session")
def same_bits():
    def check(a, b):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()

    return check
