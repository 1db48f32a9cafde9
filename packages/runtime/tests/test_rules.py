import dataclasses

import pytest

import dovetail_runtime as runtime
from dovetail_runtime import (
    CONTEXT,
    DATA,
    EXPERT,
    FSDP,
    FSDP_TENSOR,
    LOGICAL_NAMES,
    SEQUENCE,
    TENSOR,
    AxisRules,
    Rules,
)


def test_axis_rules_keep_order_are_hashable_and_immutable():
    """Order is priority, and the hash is part of jax's cache keys."""
    rules = AxisRules({"b": "x", "a": ("y", "z"), "c": None})
    assert list(rules.items()) == [("b", ("x",)), ("a", ("y", "z")), ("c", ())]
    assert rules == AxisRules([("b", "x"), ("a", ("y", "z")), ("c", None)])
    assert hash(rules) == hash(AxisRules(rules))
    assert rules != AxisRules({"a": ("y", "z"), "b": "x", "c": None})
    with pytest.raises(TypeError):
        rules["a"] = "x"


def test_a_name_with_two_rules_is_refused():
    """Flax keeps the last one silently."""
    with pytest.raises(ValueError, match="'a' has two rules"):
        AxisRules([("a", "x"), ("a", "y")])


def test_bad_rules():
    with pytest.raises(ValueError, match="twice"):
        AxisRules({"a": ("x", "x")})
    with pytest.raises(TypeError, match="'a'"):
        AxisRules({"a": (1,)})
    with pytest.raises(TypeError):
        AxisRules({1: "x"})
    with pytest.raises(ValueError, match="neither 'error' nor 'first'"):
        Rules({}, conflict="last")


def test_a_missing_name_lists_the_nearest():
    with pytest.raises(KeyError, match=r"'embde'.*'embed'"):
        FSDP.weights["embde"]


def test_activations_default_to_the_weights():
    assert Rules({"a": "x"}).of("activations") == Rules({"a": "x"}).of("weights")


def test_a_preset_can_be_changed():
    changed = dataclasses.replace(FSDP, weights={**FSDP.weights, "mlp": "tensor"})
    assert changed.weights["mlp"] == ("tensor",)
    assert FSDP.weights["mlp"] == ()


@pytest.mark.parametrize("rules", [DATA, FSDP, TENSOR, FSDP_TENSOR, SEQUENCE, CONTEXT, EXPERT])
def test_presets_know_every_logical_name_for_both_kinds(rules):
    """A model's names resolve under every preset, so that switching the preset is one word."""
    mesh = runtime.mesh(data=2, tensor=2, context=2, expert=1)
    for name in LOGICAL_NAMES:
        for kind in ("weights", "activations"):
            runtime.resolve((name,), (8,), rules.of(kind), mesh)
