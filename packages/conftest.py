"""Settings of every package's tests: strict dtypes, eight CPU devices, and the fixture for long counts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def soak() -> bool:
    """Whether the long counts run (nox -s soak); the default run takes about a tenth."""
    return os.environ.get("DOVETAIL_SOAK") == "1"
