"""Tensors used where they stand: the right values at the file's addresses, and never a changed file."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dovetail_weights import (
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

MAP = WeightMap(
    [
        Rule("plain", "plain"),
        Rule("turned", "turned", (Transpose(),)),
        Rule("heads", "heads", (Transpose(), Reshape((16, 64), (16, 4, 16)))),
        Rule("thin", "thin", (Transpose(),)),
        Rule("stacked", "part.{i}", (Stack(2),), over={"i": 2}),
        Rule("half", "half"),
        Rule("half_turned", "half_turned", (Transpose(),)),
        Rule("narrow", "narrow"),
        Rule("counts", "counts"),
        Rule("flags", "flags"),
        Rule("step", "step"),
        Rule("odd/{x}", "odd.{x}"),
        Rule("nothing", "nothing"),
    ]
)
IN_PLACE = {"plain", "turned", "heads", "thin", "half", "counts"}


def tensors():
    random = np.random.default_rng(0)

    def normal(*shape, dtype=np.float32):
        return random.standard_normal(shape, np.float32).astype(dtype)

    return {
        "odd.a": normal(3),
        "odd.b": normal(5, 7),
        "plain": normal(32, 16),
        "turned": normal(48, 16),
        "heads": normal(64, 16),
        "thin": normal(64, 1),
        "part.0": normal(16, 4),
        "part.1": normal(16, 4),
        "half": normal(32, 8, dtype=ml_dtypes.bfloat16),
        "half_turned": normal(32, 8, dtype=ml_dtypes.bfloat16),
        "narrow": normal(32, 8, dtype=np.float16),
        "counts": np.arange(64, dtype=np.int32),
        "flags": np.arange(64) % 3 == 0,
        "step": np.int32(7),
        "nothing": np.zeros((0, 4), np.float32),
    }


def like():
    shapes = {name: (value.shape, value.dtype) for name, value in tensors().items() if name[:4] not in ("odd.", "part")}
    shapes |= {"turned": ((16, 48), np.float32), "heads": ((16, 4, 16), np.float32), "thin": ((1, 64), np.float32)}
    shapes |= {"half_turned": ((8, 32), ml_dtypes.bfloat16), "narrow": ((32, 8), np.float32)}
    tree = {name: jax.ShapeDtypeStruct(*pair) for name, pair in shapes.items()}
    odd = {"a": jax.ShapeDtypeStruct((3,), np.float32), "b": jax.ShapeDtypeStruct((5, 7), np.float32)}
    return {**tree, "stacked": jax.ShapeDtypeStruct((2, 16, 4), np.float32), "odd": odd}


@pytest.fixture
def path(tmp_path):
    return write_directory(tmp_path / "d", tensors(), max_shard_bytes=6000)


def test_values_and_addresses(path):
    """What should stay in the file is copied, or an order of axes is lost."""
    directory = open_directory(path)
    assert len(directory.files) > 1
    tree = load(directory, MAP, like(), mapped=True)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), tree, load(path, MAP, like()))
    for name in IN_PLACE:
        assert tree[name].unsafe_buffer_pointer() == directory.read(name).ctypes.data, name
    for name in ("half_turned", "narrow", "stacked"):
        assert tree[name].format.layout.major_to_minor == tuple(range(tree[name].ndim))
    assert tree["heads"].format.layout.major_to_minor == (1, 2, 0)


def test_programs_and_gradients(path):
    """A program reads the axes in another order than they stand; a donated array is written to."""
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def step(tree):
        return sum(jnp.sum(jnp.sin(tree[name]) * jnp.cos(tree[name])) for name in ("plain", "turned", "heads"))

    plain, mapped = ({n: load(path, MAP, like(), mapped=m)[n] for n in ("plain", "turned", "heads")} for m in (0, 1))
    expected, got = (jax.value_and_grad(step)(tree) for tree in (plain, mapped))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)
    updated = jax.jit(lambda tree: jax.tree.map(lambda x: x - 1, tree), donate_argnums=0)
    expected, got = updated(plain), updated(mapped)
    assert all(x.is_deleted() for x in mapped.values())
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    jax.tree.map(np.testing.assert_array_equal, updated(got), updated(expected))
    assert before == {file.name: file.read_bytes() for file in path.iterdir()}


def test_leaves_outlive_the_directory(path):
    """The pages go with the map, or with the name of the file."""
    tree = load(path, MAP, like(), mapped=True)
    expected = {name: np.array(tree[name]) for name in IN_PLACE}
    write_directory(path, {"other": np.zeros(1000, np.float32)}, overwrite=True)
    for name, value in expected.items():
        np.testing.assert_array_equal(tree[name], value)


def test_placement(path):
    """A place that was asked for is taken, if it is the CPU's."""
    device = jax.devices("cpu")[0]
    mesh = jax.sharding.Mesh([device], ["x"])
    for place in (SingleDeviceSharding(device), NamedSharding(mesh, PartitionSpec())):
        tree = load(path, MAP, like(), shardings=place, mapped=True)
        assert tree["turned"].sharding == place
        np.testing.assert_array_equal(tree["turned"], tensors()["turned"].T)
    several = NamedSharding(jax.sharding.Mesh(jax.devices("cpu")[:2], ["x"]), PartitionSpec())
    with pytest.raises(WeightsError, match=r"leaves on .*0, .*1; expected .*0 alone"):
        load(path, MAP, like(), shardings=several, mapped=True)


def test_files_of_other_writers(tmp_path):
    """An address that jax does not take is copied in silence, or read as if it were another."""
    file = tmp_path / "model.safetensors"
    value = {"w": np.arange(64, dtype=np.float32)}
    for name in ("w" * length for length in range(1, 9)):
        safetensors.numpy.save_file({name: value["w"]}, file)
        start = open_directory(file).files[file.name].data_start
        table, tree = WeightMap([Rule("w", name)]), {"w": jax.ShapeDtypeStruct((64,), np.float32)}
        if start % 64:
            with pytest.raises(WeightsError, match=rf"multiple of 64 bytes.*\n.*model.safetensors: {start}"):
                load(file, table, tree, mapped=True)
        else:
            np.testing.assert_array_equal(load(file, table, tree, mapped=True)["w"], value["w"])
        again = save(tmp_path / "again", table, load(file, table, tree), overwrite=True)
        np.testing.assert_array_equal(load(again, table, tree, mapped=True)["w"], value["w"])
        assert safetensors.numpy.load_file(pathlib.Path(again) / "model.safetensors")[name].tolist() == list(range(64))
