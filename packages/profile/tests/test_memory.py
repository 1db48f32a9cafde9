from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_profile import memory, process_memory
from dovetail_profile.memory import _from_getrusage


def test_arguments_outputs_and_donation():
    """The check before a run that would not fit."""
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    size = 256 * 256 * 4
    plan = memory(jax.jit(lambda x, y: x + y).lower(x, x).compile())
    assert (plan.arguments, plan.outputs, plan.aliased) == (2 * size, size, 0)
    assert plan.total >= 3 * size
    donated = memory(jax.jit(lambda x, y: x + y, donate_argnums=0).lower(x, x).compile())
    assert donated.aliased == size
    assert donated.total == plan.total - size


def test_temporaries_are_seen():
    @partial(jax.jit)
    def f(x):
        return jnp.sort(x @ x) @ x

    plan = memory(f.lower(jax.ShapeDtypeStruct((128, 128), jnp.float32)).compile())
    assert plan.temporaries >= 128 * 128 * 4
    assert plan.peak is None or plan.arguments < plan.peak <= plan.total


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"got function.*compile"):
        memory(lambda x: x)

    class Silent:
        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="no memory plan"):
        memory(Silent())


def test_an_allocation_shows_as_anonymous_memory():
    before = process_memory()
    block = np.ones(64 << 20, np.uint8)
    after = process_memory()
    assert after.anonymous - before.anonymous > 48 << 20
    assert after.rss >= after.anonymous
    assert after.peak_rss >= after.rss - (1 << 20)
    assert block.sum() == block.size


def test_without_proc_the_peak_comes_from_getrusage():
    found = _from_getrusage()
    assert found.rss is None
    assert found.anonymous is None
    assert 0.5 < found.peak_rss / process_memory().peak_rss < 2
