import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dovetail_optim import GroupOptions, group
from dovetail_protocols.paths import PatternError

PARAMS = {"embed": jnp.ones((4, 2)), "layers": [{"w": jnp.ones((2, 2)), "b": jnp.ones(2)}]}
GRADS = jax.tree.map(lambda p: 0.5 * p, PARAMS)


def two_steps(tx, params, grads):
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_each_group_moves_as_if_it_were_alone():
    """Leaking between groups would mix learning rates and moments."""
    parts = {"embed": optax.sgd(0.1, momentum=0.9), "**/b": optax.adam(0.01), "**": optax.adamw(0.02)}
    params, _ = two_steps(group(PARAMS, parts), PARAMS, GRADS)
    for pattern, get in (
        ("embed", lambda p: p["embed"]),
        ("**/b", lambda p: p["layers"][0]["b"]),
        ("**", lambda p: p["layers"][0]["w"]),
    ):
        with jax.numpy_dtype_promotion("standard"):
            alone, _ = two_steps(parts[pattern], get(PARAMS), get(GRADS))
        np.testing.assert_array_equal(get(params), alone)


def test_frozen_groups_do_not_move_and_hold_no_state():
    """Frozen parameters whose moments are kept waste twice their memory."""
    tx = group(PARAMS, {"embed": None, "**": optax.adam(0.1)})
    params, state = two_steps(tx, PARAMS, GRADS)
    np.testing.assert_array_equal(params["embed"], PARAMS["embed"])
    assert float(params["layers"][0]["b"][0]) != 1
    assert all(leaf.shape != (4, 2) for leaf in jax.tree.leaves(state))


def test_options_go_through_the_optimizer():
    def make(options):
        return optax.adamw(0.1 * options.learning_rate, weight_decay=0.0 if options.weight_decay is False else 0.5)

    tx = group(PARAMS, {"embed": GroupOptions(0.5, weight_decay=False), "**": GroupOptions()}, optimizer=make)
    params, _ = two_steps(tx, PARAMS, GRADS)
    with jax.numpy_dtype_promotion("standard"):
        alone, _ = two_steps(optax.adamw(0.05, weight_decay=0.0), PARAMS["embed"], GRADS["embed"])
    np.testing.assert_array_equal(params["embed"], alone)


def test_abstract_parameters_will_do_and_the_state_is_plain():
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    tx = group(shapes, {"**": optax.adam(0.1)})
    leaves = jax.tree.leaves(tx.init(PARAMS))
    assert leaves
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"embde": None, "**": None}, PatternError, r"'embde' matches no leaf.*embed"),
        ({"embed": None}, PatternError, r"no pattern matches the leaf 'layers/0/b'"),
        ({}, PatternError, "no pattern matches"),
        ({"**": None, "embed": None}, ValueError, r"'embed' never comes first.*\['\*\*'\]"),
        ({"**": GroupOptions()}, TypeError, "pass optimizer="),
        ({"**": 0.1}, TypeError, r"0\.1; expected an optax transformation"),
    ],
)
def test_wrong_groups_are_refused(groups, error, message):
    with pytest.raises(error, match=message):
        group(PARAMS, groups)
