import jax
import jax.numpy as jnp
import pytest

from dovetail_profile import Cost, Counts, cost

A = Cost({("a", "dot_general"): Counts(8, 0, 0, 4), ("a/b", "exp"): Counts(0, 0, 3, 2)}, 10)
B = Cost({("a", "dot_general"): Counts(2, 1, 0, 1), ("c", "sort"): Counts(0, 5)}, 1, frozenset({"sort"}))


def test_costs_add_and_scale():
    """A training step is accumulation times a micro-batch plus the optimizer."""
    both = 3 * A + B
    assert both.entries == {
        ("a", "dot_general"): Counts(26, 1, 0, 13),
        ("a/b", "exp"): Counts(0, 0, 9, 6),
        ("c", "sort"): Counts(0, 5),
    }
    assert (both.io_bytes, both.uncounted) == (31, {"sort"})
    assert both.flops == both.matmul_flops + both.other_flops == 26 + 6
    assert A * 2 == 2 * A == A + A
    assert Cost().total == Counts()


def test_addition_equals_the_cost_of_both():
    x = jnp.ones((4, 4))
    f, g = (lambda x: x @ x), (lambda x: jnp.exp(x).sum())
    assert (cost(f, x) + cost(g, x)).total == cost(lambda x: (f(x), g(x)), x).total


def test_groups_are_sorted_by_flops():
    assert list((A + B).by_primitive) == ["dot_general", "sort", "exp"]
    assert list((A + B).by_scope(depth=1)) == ["a", "c"]
    with pytest.raises(ValueError, match="depth=0"):
        A.by_scope(depth=0)


def test_tables():
    """What a person reads: totals, shares and units are right."""
    text = (1_000_000 * A + B).table(depth=1)
    assert "8 M" in text
    assert text.splitlines()[-1].split()[0] == "total"
    lines = A.table("primitive", top=1).splitlines()
    assert [line.split()[0] for line in lines] == ["primitive", "dot_general", "(others)", "total"]
    assert "100.0%" in lines[1]
    assert "(no scope)" in cost(lambda x: x @ x, jnp.ones((2, 2))).table()
    assert Cost().table().splitlines()[-1].startswith("total")
    with pytest.raises(ValueError, match="'scope' or 'primitive'"):
        A.table("layer")


def test_a_cost_is_made_without_running_anything():
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16)
    assert cost(jnp.matmul, huge, huge).flops == 2 << 60
    assert "P" in cost(jnp.matmul, huge, huge).table() or "E" in cost(jnp.matmul, huge, huge).table()
