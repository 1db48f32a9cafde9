"""What comes back: dtypes, containers, keys, shardings of other meshes, and errors that name leaves."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_workers import Counter
from jax.sharding import PartitionSpec
from orbax.checkpoint import v1 as ocp

from dovetail_checkpoint import Manager, TreeMismatchError, all_steps

AUTO = jax.sharding.AxisType.Auto


class Adam(NamedTuple):
    count: object
    mu: object
    empty: object = ()


def mesh(n):
    return jax.make_mesh((n,), ("x",), devices=jax.devices()[:n], axis_types=(AUTO,))


def round_trip(tmp_path, state, like=None):
    with Manager(tmp_path, keep=all_steps()) as manager:
        manager.save(1, state)
        manager.wait()
        return manager.restore(like).state


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


NUMPY = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"]
NUMPY += ["float64", "complex64", "complex128"]
LOW = ["bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"]
LOW += ["float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "int2", "int4", "uint2", "uint4"]


def test_every_dtype_keeps_its_bits(tmp_path):
    """A dtype that is converted on the way would change a resumed run; zero-size and scalar leaves count too."""
    bits = np.random.default_rng(0).integers(0, 256, (3, 16), np.uint8)
    state = {}
    for name in NUMPY:
        array = bits.view(name) if name != "bool" else bits > 99
        state |= {name: array, f"{name} scalar": array[0, 0].reshape(()), f"{name} empty": array[:0]}
        if array.itemsize < 8:
            state |= {f"{name} jax": jnp.asarray(array), f"{name} jax empty": jnp.zeros((2, 0), array.dtype)}
    for name in LOW:
        array = np.arange(6).reshape(2, 3).astype(np.float32).astype(getattr(ml_dtypes, name))
        state |= {name: array, f"{name} jax": jnp.asarray(array), f"{name} scalar": array[1, 1].reshape(())}
    restored = round_trip(tmp_path, state, state)
    plain = Manager(tmp_path).restore().state
    for name, value in state.items():
        assert type(restored[name]) is type(value), name
        assert same_bits(restored[name], value), name
        assert isinstance(plain[name], np.ndarray), name
        assert same_bits(plain[name], value), name


def test_sharded_low_precision_leaves_keep_bits_and_sharding(tmp_path):
    """Dtypes that are stored as bytes must not be gathered or moved by the conversion."""
    split = jax.NamedSharding(mesh(4), PartitionSpec("x"))
    state = {
        name: jax.device_put(jnp.arange(8).astype(getattr(ml_dtypes, name)), split)
        for name in ("uint4", "float8_e4m3", "int4")
    }
    restored = round_trip(tmp_path, state, state)
    for name, value in state.items():
        assert restored[name].sharding == split
        assert same_bits(restored[name], value)


def test_containers_numbers_none_and_odd_names(tmp_path):
    """Optimizer states are NamedTuples inside tuples; names come from users."""
    state = {
        "opt": (Adam(jnp.int32(3), {"w": np.ones(2, np.float32)}), Adam(None, [])),
        "numbers": [True, -5, 2.5, 1 + 2j, 1 << 62, float("nan")],
        "a.b": {"c": np.zeros(1)},
        "a": {"b": {"c": np.ones(1)}, "": np.full(1, 2.0), "x/y": np.full(1, 3.0), "~1": np.full(1, 4.0)},
        "é ü %": np.full(1, 5.0),
        "~2": np.full(1, 6.0),
        ".": np.full(1, 7.0),
    }
    restored = round_trip(tmp_path, state, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert type(a) is type(b)
        assert same_bits(a, b)
    plain = Manager(tmp_path).restore().state
    assert plain["opt"]["1"] == {"count": None}
    assert plain["a"]["x/y"] == 3.0
    assert plain["a.b"]["c"] == 0.0
    assert plain["~2"] == 6.0
    assert plain["numbers"]["1"] == -5


@pytest.mark.parametrize("state", [{}, None, {"a": None}, (), np.zeros((0, 2)), np.arange(3), 7])
def test_degenerate_trees(tmp_path, state):
    """Orbax refuses trees without arrays; a bare leaf has the empty address."""
    restored = round_trip(tmp_path, state, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    np.testing.assert_array_equal(jax.tree.leaves(restored), jax.tree.leaves(state))


def test_typed_keys(tmp_path):
    """Resumed randomness needs the same keys of the same implementation, sharded as they were."""
    split = jax.NamedSharding(mesh(4), PartitionSpec("x"))
    state = {
        "one": jax.random.key(3),
        "rbg": jax.random.key(4, impl="rbg"),
        "many": jax.device_put(jax.random.split(jax.random.key(5), 8), split),
        "old": jax.random.PRNGKey(6),
        "empty": jax.random.key(1)[None][:0],
    }
    abstract = jax.tree.map(lambda k: jax.ShapeDtypeStruct(k.shape, k.dtype, sharding=k.sharding), state)
    for like in (state, abstract, None):
        restored = round_trip(tmp_path / str(like is None) / str(like is state), state, like)
        for name, key in state.items():
            assert restored[name].dtype == key.dtype or like is None
            data = restored[name] if name == "old" else jax.random.key_data(restored[name])
            assert same_bits(data, key if name == "old" else jax.random.key_data(key))
        if like is not None:
            assert restored["many"].sharding == split
    with pytest.raises(TreeMismatchError, match=r"one: saved key<threefry2x32>\[\], `like` has key<rbg>\[\]"):
        Manager(tmp_path / "True" / "False").restore(state | {"one": state["rbg"]})


SPECS = [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()]


def test_resharding_over_all_pairs_of_device_counts(tmp_path):
    """A run continues on another number of devices; every pair of layouts must give the same bits."""
    value = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
    with Manager(tmp_path, keep=all_steps()) as manager:
        for source in (1, 2, 4, 8):
            layouts = [jax.NamedSharding(mesh(source), spec) for spec in SPECS]
            manager.save(source, [jax.device_put(value, layout) for layout in layouts])
        manager.wait()
        for source in (1, 2, 4, 8):
            for target in (1, 2, 4, 8):
                shardings = [jax.NamedSharding(mesh(target), spec) for spec in (SPECS[1], SPECS[0], SPECS[0])]
                like = [jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=s) for s in shardings]
                restored = manager.restore(like, step=source).state
                for array, sharding in zip(restored, shardings, strict=True):
                    assert array.sharding == sharding
                    assert same_bits(array, value)


def test_uncommitted_arrays_stay_uncommitted(tmp_path):
    """A step counter pinned to device 0 cannot be used with parameters on a mesh."""
    split = jax.NamedSharding(mesh(8), PartitionSpec("x"))
    state = {
        "w": jax.device_put(jnp.ones(8), split),
        "step": jnp.int32(4),
        "pinned": jax.device_put(1.0, jax.devices()[3]),
    }
    restored = round_trip(tmp_path, state, state)
    assert {name: array.committed for name, array in restored.items()} == {"w": True, "step": False, "pinned": True}
    assert restored["pinned"].devices() == {jax.devices()[3]}
    jax.jit(lambda t: t["w"] * t["step"].astype(jnp.float32))({"w": restored["w"], "step": restored["step"]})
    abstract = jax.eval_shape(lambda: {"w": jnp.ones(8), "step": jnp.int32(0), "pinned": jnp.float32(0)})
    assert not Manager(tmp_path).restore(abstract).state["w"].committed


def test_like_decides_between_numpy_and_jax(tmp_path):
    """What was saved from NumPy can be restored to devices and the other way round."""
    state = {"n": np.ones(3, np.float32), "j": jnp.ones(3), "scalar": np.float32(2)}
    like = {"n": jnp.zeros(3), "j": np.zeros(3, np.float32), "scalar": np.float32(0)}
    restored = round_trip(tmp_path, state, like)
    assert isinstance(restored["n"], jax.Array)
    assert type(restored["j"]) is np.ndarray
    assert type(restored["scalar"]) is np.float32


def test_64_bit_leaves_do_not_lose_bits_silently(tmp_path):
    """With 64-bit types off jax would truncate."""
    with pytest.raises(TreeMismatchError, match="jax_enable_x64"):
        round_trip(tmp_path, {"x": np.ones(3)}, {"x": jax.ShapeDtypeStruct((3,), np.float64)})
    with pytest.raises(TreeMismatchError, match=r"x: saved float64\[3\], `like` has float32\[3\]"):
        Manager(tmp_path).restore({"x": jnp.ones(3)})


def test_differences_are_short_and_name_leaves_and_values(tmp_path):
    """Peers print pages of storage specifications here."""
    layers = {f"layer{i}": {"kernel": np.zeros((4, 4), np.float32)} for i in range(12)}
    state = {"params": layers, "step": 3, "bias": np.zeros(4, np.float32)}
    like = {
        "params": layers
        | {"layer3": {"kernal": np.zeros((4, 4), np.float32)}, "layer4": {"kernel": jnp.zeros((4, 5))}},
        "step": jnp.int32(3),
        "bias": jnp.zeros(4, jnp.bfloat16),
    }
    with pytest.raises(TreeMismatchError) as caught:
        round_trip(tmp_path, state, like)
    text = str(caught.value)
    assert "params/layer3/kernal (float32[4,4]) is not in the step; nearest: params/layer3/kernel" in text
    assert "params/layer3/kernel (float32[4,4]) is in the step but not in `like`; nearest: params/layer3/kernal" in text
    assert "params/layer4/kernel: saved float32[4,4], `like` has float32[4,5]" in text
    assert "step: saved a Python int, `like` has int32[]" in text
    assert "bias: saved float32[4], `like` has bfloat16[4]" in text
    with pytest.raises(TreeMismatchError, match="and 6 more"):
        Manager(tmp_path).restore({})
    uneven = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.NamedSharding(mesh(8), PartitionSpec("x")))
    with pytest.raises(TreeMismatchError, match=r"bias: float32\[4\] cannot be divided as `like` asks, NamedSharding"):
        Manager(tmp_path).restore(state | {"bias": uneven})
    assert Manager(tmp_path).steps() == [1]
    with pytest.raises(TypeError, match="'a' of `like` is a str"):
        Manager(tmp_path).restore({"a": "x"})


def test_choice_of_step(tmp_path):
    """An explicit step never falls back; absent ones are named with what there is."""
    with Manager(tmp_path, keep=all_steps()) as manager:
        for step in (1, 5):
            manager.save(step, {"x": step})
        assert manager.restore().step == 5
        assert manager.restore(step=1).state == {"x": 1}
        with pytest.raises(FileNotFoundError, match=r"no step 3 .* \[1, 5\]"):
            manager.restore(step=3)
        with pytest.raises(ValueError, match="step=-1"):
            manager.restore(step=-1)


def test_a_loader_needs_a_saved_position(tmp_path):
    """Beginning the data anew without a word would repeat it."""
    loader = Counter(9)
    with Manager(tmp_path) as manager:
        manager.save(1, {"x": 1})
        with pytest.raises(ValueError, match="saved without a loader"):
            manager.restore(data=loader)
        manager.save(2, {"x": 1}, data=Counter(4))
        with pytest.raises(TreeMismatchError):
            manager.restore({"y": 1}, data=loader)
        assert loader.position == 9
        manager.restore({"x": 0}, data=loader)
    assert loader.position == 4


def test_plain_orbax_reads_a_step(tmp_path):
    """No lock-in: the README's recipe, with and without an abstract tree."""
    split = jax.NamedSharding(mesh(4), PartitionSpec("x"))
    state = {"w": jax.device_put(jnp.arange(8.0), split), "o": (np.ones(2), 3), "k": jax.random.key(3)}
    with Manager(tmp_path, compress=True) as manager:
        manager.save(7, state)
    target = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jax.NamedSharding(mesh(2), PartitionSpec("x")))}
    target |= {"o": {"0": np.empty(2), "1": np.empty((), np.int64)}, "k": np.empty(2, np.uint32)}
    tree = ocp.load(str(tmp_path / "7"), target)
    assert tree["w"].sharding == target["w"].sharding
    np.testing.assert_array_equal(tree["w"], np.arange(8.0))
    np.testing.assert_array_equal(tree["o"]["0"], np.ones(2))
    assert tree["o"]["1"] == 3
    np.testing.assert_array_equal(tree["k"], jax.random.key_data(state["k"]))
    metadata = ocp.metadata(str(tmp_path / "7")).metadata
    assert metadata["w"].shape == (8,)
    checkpointer = ocp.training.Checkpointer(str(tmp_path))
    assert checkpointer.latest.step == 7
    checkpointer.close()
