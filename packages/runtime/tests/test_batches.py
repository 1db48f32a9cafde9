import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dovetail_runtime import DATA, FSDP, TENSOR, Rules, ShardingError, batch_sharding, mesh, put_batch

BATCH = {"tokens": np.arange(32, dtype=np.int32).reshape(8, 4), "weight": np.ones(8, np.float32)}


@pytest.mark.parametrize(
    ("rules", "spec"),
    [(DATA, P("data")), (FSDP, P(("data", "fsdp"))), (TENSOR, P("data")), (Rules({"batch": None}), P())],
)
def test_rows_are_split_by_the_rules_and_keep_their_values(rules, spec):
    made = mesh(data=2, fsdp=2, tensor=2)
    out = put_batch(BATCH, made, rules)
    assert batch_sharding(made, rules).spec == spec
    assert out["tokens"].sharding == batch_sharding(made, rules)
    for name, leaf in BATCH.items():
        np.testing.assert_array_equal(out[name], leaf)


def test_one_device():
    out = put_batch(BATCH, mesh(devices=jax.devices()[:1]), FSDP)
    np.testing.assert_array_equal(out["tokens"], BATCH["tokens"])


@pytest.mark.parametrize("devices", [1, 8])
def test_a_loader_may_reuse_its_buffer(devices):
    """jax shares the memory of NumPy arrays on CPU: without a copy the batch of a running step would change."""
    buffer = np.zeros((64, 64), np.float32)
    out = put_batch({"x": buffer}, mesh(devices=jax.devices()[:devices]), DATA)
    buffer[:] = 7
    assert float(np.asarray(out["x"]).max()) == 0


def test_wide_integers_are_narrowed_only_if_they_fit():
    out = put_batch({"x": np.full((8,), 2**31 - 1, np.int64)}, mesh(), DATA)["x"]
    assert out.dtype == np.int32
    assert int(out[0]) == 2**31 - 1
    with pytest.raises(TypeError, match=r"'x' is int64.*int32"):
        put_batch({"x": np.full((8,), 2**31, np.int64)}, mesh(), DATA)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": np.ones((8, 2))}, TypeError, "'x' is float64"),
        ({"x": np.float32(1)}, TypeError, "'x' has no leading axis"),
        ({"x": np.array(["a"] * 8)}, TypeError, "'x' has dtype"),
        ({"x": np.ones(8, np.float32), "y": np.ones(4, np.float32)}, ValueError, "'x': 8, 'y': 4"),
        ({"x": np.ones(6, np.float32)}, ValueError, r"6 rows do not divide over 8.*data=8"),
    ],
)
def test_bad_batches_say_which_leaf(batch, error, message):
    with pytest.raises(error, match=message):
        put_batch(batch, mesh(), DATA)


def test_rules_without_a_batch():
    with pytest.raises(ShardingError, match="place no batch"):
        put_batch(BATCH, mesh(), Rules({"embed": "fsdp"}))


TWO = """
import jax; jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
import dovetail_runtime as rt
me = rt.initialize()
made = rt.mesh(data=-1)
rows = np.arange(4, dtype=np.int32).reshape(4, 1) + 4 * me.index
out = rt.put_batch({"x": rows}, made, rt.DATA)["x"]
gathered = jax.experimental.multihost_utils.process_allgather(out, tiled=True)
print("GLOBAL", out.shape, gathered[:, 0].tolist(), int(jax.jit(lambda x: x.sum())(out)))
pair = rt.mesh(tensor=2, data=2)
same = rt.put_batch({"x": np.arange(4, dtype=np.int32)}, pair, rt.TENSOR)["x"]
print("SAME", same.shape, flush=True)
rt.shutdown()
"""


def test_two_processes_make_one_global_batch(start):
    """Each process loads its own rows; a wrong order or a duplicate would train on the wrong data."""
    children = start("import jax.experimental.multihost_utils\n" + TWO, 2)
    for code, output in children.finish(90):
        assert code == 0, output
        assert "GLOBAL (8, 1) [0, 1, 2, 3, 4, 5, 6, 7] 28" in output
        assert "SAME (4,)" in output
