import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dovetail_weights import (
    Concat,
    Lazy,
    Reshape,
    Rule,
    Stack,
    Transpose,
    WeightMap,
    WeightsError,
    load,
    open_directory,
    save,
    write_directory,
)

LAYERS, D, HEADS, DIM = 2, 8, 4, 2
MAP = WeightMap(
    [
        Rule("embed/table", "model.embed.weight"),
        Rule("layers/{i}/query/kernel", "model.layers.{i}.q.weight", (Transpose(), Reshape((D, 8), (D, HEADS, DIM)))),
        Rule("layers/{i}/gate_up", ("model.layers.{i}.gate", "model.layers.{i}.up"), (Concat((8, 8)), Transpose())),
        Rule("experts/{n}", "experts.{e}.{n}", (Stack(4),), over={"e": 4}),
        Rule("step", "step"),
    ]
)


@pytest.fixture
def tree():
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    layers = [{"query": {"kernel": normal(D, HEADS, DIM)}, "gate_up": normal(8, 16)} for _ in range(LAYERS)]
    return {
        "embed": {"table": normal(16, D)},
        "layers": layers,
        "experts": {"w": normal(4, 8, 3)},
        "step": jnp.int32(7),
    }


def equal(a, b):
    jax.tree.map(lambda x, y: (np.testing.assert_array_equal(x, y), None)[1], a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def shapes(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def test_names_and_values_are_the_other_side_s(tree, tmp_path):
    """What save writes is not what another program expects under that name."""
    path = save(tmp_path / "d", MAP, tree)
    theirs = safetensors.numpy.load_file(path / "model.safetensors")
    kernel = np.asarray(tree["layers"][1]["query"]["kernel"])
    np.testing.assert_array_equal(theirs["model.layers.1.q.weight"], kernel.reshape(D, -1).T)
    np.testing.assert_array_equal(theirs["model.layers.0.up"], np.asarray(tree["layers"][0]["gate_up"])[:, 8:].T)
    np.testing.assert_array_equal(theirs["experts.3.w"], tree["experts"]["w"][3])
    assert set(theirs) == {
        "model.embed.weight",
        "step",
        *[f"model.layers.{i}.{n}" for i in range(2) for n in ("q.weight", "gate", "up")],
        *[f"experts.{e}.w" for e in range(4)],
    }


@pytest.mark.parametrize("shard", [10**9, 300])
def test_round_trip(tree, tmp_path, shard):
    """A leaf changes on its way out and in."""
    path = save(tmp_path / "d", MAP, tree, max_shard_bytes=shard, extra_files={"config.json": "{}"})
    equal(load(path, MAP, shapes(tree)), tree)
    equal(load(open_directory(path), MAP, tree), tree)


def test_sharded_in_and_out(tree, tmp_path):
    """On several devices a device gets another part, or save writes a part."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {
        "embed": {"table": PartitionSpec("a", "b")},
        "layers": [{"query": {"kernel": PartitionSpec(None, "a", "b")}, "gate_up": PartitionSpec("b", "a")}] * 2,
        "experts": {"w": PartitionSpec("b", "a")},
        "step": PartitionSpec(),
    }
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, PartitionSpec))
    path = save(tmp_path / "d", MAP, tree)
    loaded = load(path, MAP, shapes(tree), shardings=shardings)
    equal(loaded, tree)
    jax.tree.map(lambda x, s: pytest.fail("sharding") if x.sharding != s else None, loaded, shardings)
    again = save(tmp_path / "e", MAP, loaded)
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
    assert load(path, MAP, like)["embed"]["table"].sharding == shardings["embed"]["table"]
    everywhere = NamedSharding(mesh, PartitionSpec())
    assert load(path, MAP, tree, shardings=everywhere)["step"].sharding == everywhere
    one = SingleDeviceSharding(jax.devices()[3])
    assert load(path, MAP, tree, shardings=one)["step"].devices() == {jax.devices()[3]}


def test_what_is_loaded_does_not_hang_on_the_file(tree, tmp_path):
    """Weights change, or the process dies, when the file is overwritten after the load."""
    path = save(tmp_path / "d", MAP, tree)
    loaded = load(path, MAP, tree)
    file = path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
        stream.truncate(0)
    equal(loaded, tree)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint8", "bool", "int32"])
@pytest.mark.parametrize("axes", [(1, 0), (2, 0, 1), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("parts", [1, 8])
def test_permuted_axes(name, axes, parts, tmp_path):
    """Views with strides go to a device as they are, whatever the size of a number, whole and in parts."""
    dtype = jnp.dtype(name)
    shape = (16, 24, 40)[: len(axes)]
    value = np.random.default_rng(0).integers(0, 2 if name == "bool" else 100, shape).astype(dtype)
    write_directory(tmp_path, {"w": value}, overwrite=True)
    expected = value.transpose(axes)
    mesh = jax.make_mesh((parts,), ("x",), devices=jax.devices()[:parts], axis_types=(jax.sharding.AxisType.Auto,))
    like = {"w": jax.ShapeDtypeStruct(expected.shape, dtype)}
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
        found = load(
            tmp_path, WeightMap([Rule("w", "w", (Transpose(axes),))]), like, shardings=NamedSharding(mesh, spec)
        )
        np.testing.assert_array_equal(found["w"], expected)


def test_dtypes(tree, tmp_path):
    """A dtype option is ignored, hits integers, or a float becomes an integer silently."""
    path = save(tmp_path / "d", MAP, tree, dtype=jnp.bfloat16)
    assert open_directory(path)["experts.0.w"].dtype == ml_dtypes.bfloat16
    assert open_directory(path)["step"].dtype == np.int32
    loaded = load(path, MAP, tree)
    assert loaded["embed"]["table"].dtype == jnp.float32
    np.testing.assert_array_equal(
        loaded["embed"]["table"], tree["embed"]["table"].astype(jnp.bfloat16).astype("float32")
    )
    half = load(path, MAP, tree, dtype=jnp.float16)
    assert half["embed"]["table"].dtype == jnp.float16
    assert half["step"].dtype == jnp.int32
    with pytest.raises(WeightsError, match="floating-point"):
        load(path, MAP, tree, dtype=jnp.int8)
    with pytest.raises(WeightsError, match=r"step: is int32, step needs float32"):
        load(path, MAP, shapes(tree, jnp.float32))
    with pytest.raises(WeightsError, match=r"jax_enable_x64.*\n.*step"):
        load(path, MAP, tree | {"step": np.int64(3)})


def test_a_float64_numpy_tree_is_saved_as_it_is(tmp_path):
    """NumPy leaves are narrowed on their way out."""
    path = save(tmp_path / "d", WeightMap([Rule("a", "a")]), {"a": np.array([1 / 3])})
    assert open_directory(path).read("a")[0] == 1 / 3
    equal(load(path, WeightMap([Rule("a", "a")]), {"a": np.zeros(1)}, dtype=jnp.float32), {"a": np.float32([1 / 3])})


def test_every_difference_is_listed(tree, tmp_path):
    """Of several differences only one is named, or a tensor that nobody reads goes unnoticed."""
    tensors = {
        "model.embed.weight": np.zeros((3, D), np.float32),
        "model.embed.wieght": np.zeros(1),
        "inv_freq": np.zeros(1),
    }
    path = write_directory(tmp_path / "d", tensors)
    with pytest.raises(WeightsError) as error:
        load(path, MAP, tree)
    message = str(error.value)
    assert "model.embed.weight: has shape (3, 8), embed/table needs (16, 8)" in message
    assert "model.layers.1.q.weight: missing" in message
    assert message.count("missing") == 6 + 4 + 1
    assert "inv_freq: unexpected" in message
    write_directory(tmp_path / "e", {"a": np.zeros(1, "f4"), "l.0.rotary.inv_freq": np.zeros(1)})
    one = WeightMap([Rule("a", "a")])
    equal(load(tmp_path / "e", one, {"a": jnp.zeros(1)}, ignore=["*.inv_freq"]), {"a": jnp.zeros(1)})


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (3.0, "expected an array"),
        (jax.ShapeDtypeStruct((), jnp.float32), "no values"),
        (np.array("x"), "cannot be stored"),
    ],
)
def test_leaves_that_cannot_be_saved(tmp_path, leaf, match):
    """A leaf without values, or of a foreign type, is written as something."""
    with pytest.raises(WeightsError, match=match):
        save(tmp_path / "d", WeightMap([Rule("a", "a")]), {"a": leaf})
    assert list(tmp_path.iterdir()) == []


def test_random_keys_are_refused(tmp_path):
    """A typed random key is written as bits that cannot be read back."""
    with pytest.raises(WeightsError, match="cannot be stored"):
        save(tmp_path / "d", WeightMap([Rule("a", "a")]), {"a": jax.random.key(0)})


def test_wrong_number_of_shardings(tree, tmp_path):
    """Shardings are assigned to the wrong leaves."""
    path = save(tmp_path / "d", MAP, tree)
    with pytest.raises(WeightsError, match="shardings has 1 leaves"):
        load(path, MAP, tree, shardings=[SingleDeviceSharding(jax.devices()[0])])


PEAK = """
import sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from dovetail_weights import Rule, Stack, Transpose, WeightMap, load, save

def anon():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

n = 2048
table = WeightMap([Rule("a/{i}", "a.{i}", (Transpose(),)), Rule("s", "s.{i}", (Stack(2),), over={"i": 2})])
like = {"a": {str(i): jax.ShapeDtypeStruct((n, n), jnp.float32) for i in range(10)},
        "s": jax.ShapeDtypeStruct((2, n, n), jnp.float32)}
size, largest = 12 * n * n * 4, 2 * n * n * 4
jax.block_until_ready(jnp.zeros(3) + 1)
peak, stop = [0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anon())
        time.sleep(0.002)

if sys.argv[2] == "save":
    tree = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), like)
    jax.block_until_ready(tree)
thread = threading.Thread(target=watch)
thread.start()
if sys.argv[2] == "save":
    save(sys.argv[1], table, tree, max_shard_bytes=100_000_000)
else:
    tree = load(sys.argv[1], table, like)
stop.set()
thread.join()
allowed = size + 1.3 * largest + 150e6
print(f"{sys.argv[2]}: peak {peak[0] / 1e6:.0f} MB, weights {size / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB")
assert peak[0] < allowed
assert float(tree["a"]["3"][5, 7]) == 1.0
"""


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """Loading or saving needs the weights twice."""
    for job in ("save", "load"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / "d"), job],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={"JAX_PLATFORMS": "cpu"},
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_lazy_arrays_are_loaded_and_saved_as_files_and_arrays_are(tmp_path):
    table = WeightMap([Rule("a/{x}", "b.{x}")])
    lazy = Lazy((2, 3), np.dtype("float32"), lambda index: np.arange(6, dtype="float32").reshape(2, 3)[index])
    path = save(tmp_path / "m", table, {"a": {"w": lazy}}, dtype="bfloat16")
    assert open_directory(path)["b.w"].dtype == jnp.bfloat16
    loaded = load({"b.w": lazy}, table, {"a": {"w": jnp.zeros((2, 3))}})
    np.testing.assert_array_equal(loaded["a"]["w"], np.arange(6).reshape(2, 3))
    with pytest.raises(WeightsError, match="expected a directory"):
        load({"b.w": lazy}, table, {"a": {"w": jnp.zeros((2, 3))}}, mapped=True)
