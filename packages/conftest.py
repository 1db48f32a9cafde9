"""Settings of every package's tests: strict dtypes, eight CPU devices, long counts on demand, examples as tests."""

import collections
import os
import tempfile

import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


SOAK = os.environ.get("DOVETAIL_SOAK") == "1"


@pytest.fixture
def soak() -> bool:
    """Whether the long counts run (nox -s soak); the default run takes about a tenth."""
    return SOAK


def pytest_collection_modifyitems(items):
    """Leave all but every so manieth case of a thinned test to the long counts."""
    cases = collections.Counter()
    for item in items:
        if thin := item.get_closest_marker("thin"):
            test = item.nodeid.partition("[")[0]
            if cases[test] % thin.args[0]:
                item.add_marker(pytest.mark.soak)
            cases[test] += 1


def pytest_runtest_setup(item):
    """Leave what is marked so to the long counts."""
    if item.get_closest_marker("soak") and not SOAK:
        pytest.skip("long: set DOVETAIL_SOAK=1")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A directory for the relative paths and temporary files of a document's examples."""
    where = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setattr(tempfile, "tempdir", str(where))
        yield


pytest_collect_file = (
    Sybil([PythonCodeBlockParser()], filenames=["README.md"], fixtures=["reader"])
    + Sybil([DocTestParser()], patterns=["src/*/*.py", "src/*/*/*.py"], fixtures=["reader"])
).pytest()
