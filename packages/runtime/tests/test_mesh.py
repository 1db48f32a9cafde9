import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dovetail_runtime import mesh


def test_minus_one_takes_the_rest_in_the_given_order():
    """A wrong order would put the fastest interconnect under the wrong axis."""
    made = mesh(data=-1, fsdp=2)
    assert dict(made.shape) == {"data": 4, "fsdp": 2}
    assert tuple(made.shape) == ("data", "fsdp")


def test_axes_are_auto_so_that_an_ordinary_matmul_of_sharded_arrays_works():
    """With jax.make_mesh's default explicit axes this product raises ShardingTypeError."""
    made = mesh(data=8)
    a = jax.device_put(jnp.ones((8, 8)), NamedSharding(made, PartitionSpec("data")))
    assert float((a @ a.T).sum()) == 8**3
    assert made.axis_types == (AxisType.Auto,)


def test_no_global_mesh_is_set():
    """A global mesh would change code that never asked for one."""
    mesh(data=8)
    assert jax.sharding.get_abstract_mesh().empty


def test_without_axes_all_devices_are_data():
    assert dict(mesh().shape) == {"data": 8}


def test_one_device():
    made = mesh(data=-1, fsdp=1, devices=jax.devices()[:1])
    assert made.size == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, r"data=3.*3 devices.*there are 8"),
        ({"data": -1, "fsdp": 3}, r"data=-1, fsdp=3.*multiple of 3.*8"),
        ({"data": 4}, r"4 devices, but there are 8.*-1"),
        ({"data": 16}, r"16 devices"),
        ({"data": -1, "fsdp": -1}, r"\['data', 'fsdp'\] are all -1"),
        ({"data": 0}, "is 0"),
        ({"data": -2}, "is -2"),
    ],
)
def test_sizes_that_do_not_fit_print_the_sizes(axes, message):
    with pytest.raises(ValueError, match=message):
        mesh(**axes)


@pytest.mark.parametrize("size", [2.0, "2", True, None])
def test_sizes_are_ints(size):
    with pytest.raises(TypeError, match="give an int"):
        mesh(data=size)
