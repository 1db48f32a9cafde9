import jax
import numpy as np
import pytest

from dovetail_profile import known_peak, measure_matmul_rate, peak_flops


def test_the_measured_rate_is_plausible():
    """Between a microcontroller and a data centre: a unit error is at least a factor of 1000."""
    rate = measure_matmul_rate(256, 256, 256, seconds=0.05)
    assert 1e8 < rate < 1e16


def test_the_rate_does_not_depend_on_counting():
    """2 m n k: twice the work takes longer, so the two rates are of one size."""
    small, large = (measure_matmul_rate(128, 256, k, seconds=0.05) for k in (256, 512))
    assert 0.1 < small / large < 10


@pytest.mark.parametrize(
    ("kind", "dtype", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float16", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("TPU v6 lite", "float16", None),
        ("NVIDIA H200", "float32", None),
        ("cpu", "bfloat16", None),
        ("Some new chip", "bfloat16", None),
    ],
)
def test_datasheets(kind, dtype, rate):
    """A wrong peak makes every utilisation wrong; an unknown one is measured, not guessed."""
    assert known_peak(kind, dtype) == rate


def test_the_peak_of_a_cpu_is_measured():
    assert jax.devices()[0].platform != "cpu" or peak_flops(np.float32, seconds=0.02) > 1e8


def test_bad_arguments():
    with pytest.raises(ValueError, match="k=0"):
        measure_matmul_rate(1, 1, 0)
    with pytest.raises(ValueError, match="positive time"):
        measure_matmul_rate(1, 1, 1, seconds=0)
    with pytest.raises(TypeError):
        known_peak("cpu", "no such dtype")
