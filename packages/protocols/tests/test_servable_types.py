"""TensorSpec.bind accepts what fits and names the input and the axis of what does not."""

import numpy as np
import pytest

from dovetail_protocols import TensorSpec


def test_bind_records_symbolic_axes():
    axes = {}
    TensorSpec("float32", ("batch", 3)).bind("x", np.zeros((5, 3), np.float32), axes)
    TensorSpec("int32", ("batch", "time")).bind("ids", np.zeros((5, 0), np.int32), axes)
    TensorSpec("float32", ()).bind("scalar", np.float32(1), axes)
    assert axes == {"batch": 5, "time": 0}


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((5, 3)),
        np.zeros((5, 3, 1), np.float32),
        np.zeros((5, 4), np.float32),
        np.zeros((4, 3), np.float32),
        [[1.0, 2.0, 3.0]] * 5,
        np.float32(1),
    ],
)
def test_bind_refuses(value):
    with pytest.raises(ValueError, match=r"input 'x'.*expected"):
        TensorSpec("float32", ("batch", 3)).bind("x", value, {"batch": 5})
