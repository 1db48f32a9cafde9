import threading

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dovetail_runtime import (
    CONTEXT,
    DATA,
    FSDP,
    FSDP_TENSOR,
    TENSOR,
    Rules,
    ShardingError,
    constrain,
    current,
    mesh,
    split_of,
    use,
)

X = jnp.ones((8, 8))
A, B = Rules({"rows": "data"}), Rules({"rows": "tensor"})


@jax.jit
def direct(x):
    return constrain(x, "rows", None)


@jax.jit
def inner(x):
    return constrain(x, "rows", None)


def body(carry, _):
    return constrain(carry, "rows", None), None


nested = jax.jit(lambda x: inner(x) * 1)
scanned = jax.jit(lambda x: jax.lax.scan(body, x, None, length=2)[0])
remat = jax.jit(jax.grad(lambda x: (jax.checkpoint(lambda y: constrain(y, "rows", None) ** 2)(x)).sum()))


@pytest.mark.parametrize("f", [direct, nested, scanned, remat], ids=["jit", "nested jit", "scan", "grad of remat"])
def test_one_function_under_two_rule_sets_has_two_constraints(f):
    """A stale trace would silently keep the layout of the first rules."""
    made = mesh(data=4, tensor=2)
    for rules, spec in ((A, P("data")), (B, P("tensor")), (A, P("data"))):
        with use(made, rules):
            assert f(X).sharding.spec == spec
    assert f(X).sharding.num_devices == 1
    other = mesh(data=2, tensor=4)
    with use(other, A):
        assert f(X).sharding.mesh == other


def test_equal_rules_share_one_trace():
    """A retrace per step would cost a compilation each."""
    traces = []

    @jax.jit
    def f(x):
        traces.append(1)
        return constrain(x, "rows", None)

    for _ in range(3):
        with use(mesh(data=8), Rules({"rows": "data"})):
            f(X)
    assert len(traces) == 1


def test_without_a_context_it_returns_its_input():
    assert constrain(X, "anything", "at all") is X
    assert current() is None


def test_one_device_checks_the_names_and_changes_nothing():
    with use(mesh(devices=jax.devices()[:1]), DATA):
        assert constrain(X, "batch", "embed") is X
        with pytest.raises(ShardingError, match="'bathc'"):
            constrain(X, "bathc", None)


def test_the_context_ends_with_the_block_also_after_an_error_and_nests():
    with pytest.raises(KeyError), use(mesh(), DATA):
        raise KeyError
    with use(mesh(), DATA):
        with use(mesh(), FSDP):
            assert current().rules is FSDP
        assert current().rules is DATA
    assert current() is None


def test_threads_do_not_see_each_other():
    """Two threads with two layouts must not mix (a server and a trainer in one process)."""
    made, found = mesh(data=4, tensor=2), {}
    barrier = threading.Barrier(2)

    def work(rules):
        with use(made, rules):
            barrier.wait(20)
            found[rules] = direct(X).sharding.spec
            barrier.wait(20)

    threads = [threading.Thread(target=work, args=(rules,)) for rules in (A, B)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {A: P("data"), B: P("tensor")}
    assert current() is None


def test_inside_shard_map_manual_axes_are_left_out():
    """Models that call constrain also run inside a pipeline stage or a kernel's shard_map."""
    made = mesh(data=4, tensor=2)

    def f(x):
        return constrain(x, "batch", "mlp") * 2

    with use(made, TENSOR):
        full = jax.shard_map(f, mesh=made, in_specs=P("data", "tensor"), out_specs=P("data", "tensor"))
        some = jax.shard_map(f, mesh=made, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        assert float(jax.jit(full)(X).sum()) == 128
        out = jax.jit(some)(X)
    assert float(out.sum()) == 128
    assert out.sharding.spec == P("data", "tensor")


def test_vmap_and_grad_go_through():
    with use(mesh(fsdp=8), FSDP):
        out = jax.vmap(lambda x: constrain(x, "batch", "embed"))(jnp.ones((3, 8, 2)))
        grad = jax.grad(lambda x: constrain(x, "batch", "embed").sum())(X)
    assert out.shape == (3, 8, 2)
    assert float(grad.sum()) == 64


def test_a_mesh_with_explicit_axes_is_resharded():
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit), use(explicit, DATA):
        out = jax.jit(lambda x: constrain(x, "batch", None))(X)
    assert out.sharding.spec == P("data", None)


def test_the_values_do_not_change():
    x = jax.random.normal(jax.random.key(0), (8, 4))
    with use(mesh(data=2, fsdp=2, tensor=2), FSDP_TENSOR):
        assert (jax.jit(lambda x: constrain(x, "batch", "mlp"))(x) == x).all()


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"dovetail_runtime.mesh"), use("data", DATA):
        pass
    with pytest.raises(TypeError, match="preset"), use(mesh(), {"batch": "data"}):
        pass
    with use(mesh(data=8), DATA), pytest.raises(ShardingError, match="1 logical names"):
        constrain(X, "batch")


def test_what_a_name_is_split_over():
    """A mixer of rows asks before it attends as if it had them whole."""
    grid = mesh(data=2, context=4)
    assert split_of("time") is None
    with use(grid, CONTEXT):
        assert split_of("time") == (grid, "context")
        assert split_of("heads") is None
        assert split_of("a name without a rule") is None
    with use(mesh(data=8, context=1), CONTEXT):
        assert split_of("time") is None
    with use(grid, Rules({"time": ("data", "context")})), pytest.raises(ShardingError, match=r"'time' over .*'data'"):
        split_of("time")
