"""What importing the package costs and does."""

import subprocess
import sys
from types import ModuleType

import pytest

import dovetail_models

PROGRAM = """
import sys, time
import jax, jaxtyping, numpy, ml_dtypes, xxhash
jax.numpy
begin = time.process_time()
import flax.nnx
flax = time.process_time() - begin
import dovetail_protocols, dovetail_kernels, dovetail_runtime, dovetail_weights
before = dict(jax.config.values)
begin = time.process_time()
from dovetail_models import *
print((time.process_time() - begin) / flax)
import threading
assert threading.active_count() == 1
assert dict(jax.config.values) == before
assert not {"pytest", "transformers", "torch", "dovetail_train"} & set(sys.modules)
"""


def test_importing_is_light_and_does_nothing() -> None:
    """Every process pays for an import, little beside flax.nnx; and settings must not change unseen."""
    command = [sys.executable, "-c", PROGRAM]
    runs = (subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout for _ in "12")
    assert min(float(out) for out in runs) < 0.4


def test_the_package_alone_imports_nothing() -> None:
    """`dovetail --help` imports the modules of all commands, and with them the package."""
    program = "import sys, dovetail_models; print({'jax', 'flax', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout.strip() == b"set()"


def test_public_names() -> None:
    """All of them are there, none is hidden by a module of the same name, and others are errors."""
    for name in dovetail_models.__all__:
        assert not isinstance(getattr(dovetail_models, name), ModuleType), name
    assert set(dovetail_models.__all__) <= set(dir(dovetail_models))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dovetail_models.nothing


def test_modules_can_be_imported_first() -> None:
    """A command imports a module before any public name was used."""
    program = "from dovetail_models import hf_config; import dovetail_models.family"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
