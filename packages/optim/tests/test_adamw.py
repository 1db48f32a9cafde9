import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dovetail_optim import GroupOptions, adamw, decay_matrices, wsd
from dovetail_protocols.paths import PatternError, flatten

SHAPES = {"embed": {"kernel": (12, 4)}, "layers": {0: {"kernel": (4, 6), "bias": (6,)}, 1: {"kernel": (4, 6)}}}


def tree(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), SHAPES, is_leaf=is_shape)


def run(tx, steps=5, jit=True):
    params = tree(0)
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)) if jit else step
    for i in range(steps):
        params, state = step(params, state, tree(i + 1))
    return params, state


def truth(steps=5, *, lr=1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=None, decays=None, factor=None):
    """AdamW in float64 NumPy, from the paper."""
    params = {k: np.asarray(v, np.float64) for k, v in flatten(tree(0)).items()}
    m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for t in range(1, steps + 1):
        grads = {k: np.asarray(g, np.float64) for k, g in flatten(tree(t)).items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        rate = lr(t - 1) if callable(lr) else lr
        for k, p in params.items():
            g = grads[k] * (clip / norm if clip and norm >= clip else 1)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            direction = m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            decay = weight_decay if (decays or (lambda _, p: p.ndim >= 2))(k, p) else 0
            params[k] = p - rate * (factor or (lambda _: 1))(k) * (direction + decay * p)
    return params


def assert_close(params, expected, tolerance=1e-6):
    assert expected.keys() == flatten(params).keys()
    for address, value in flatten(params).items():
        np.testing.assert_allclose(value, expected[address], rtol=tolerance, atol=tolerance, err_msg=address)


CASES = {
    "defaults": ({}, {}),
    "hyperparameters": (
        {"b1": 0.8, "b2": 0.999, "eps": 1e-3, "weight_decay": 0.3},
        {"b1": 0.8, "b2": 0.999, "eps": 1e-3, "weight_decay": 0.3},
    ),
    "clipped": ({"clip_norm": 0.5}, {"clip": 0.5}),
    "clip that never acts": ({"clip_norm": 1e6}, {}),
    "patterns": ({"decay": ["**/bias", "embed/*"]}, {"decays": lambda k, p: k.endswith("bias") or "embed" in k}),
    "one pattern": ({"decay": "layers/**"}, {"decays": lambda k, p: k.startswith("layers")}),
    "mask function": ({"decay": lambda p: jax.tree.map(lambda _: True, p)}, {"decays": lambda k, p: True}),
    "factors": (
        {"groups": {"embed/**": 0.1, "**/0/*": 2.0}},
        {"factor": lambda k: 0.1 if "embed" in k else 2.0 if "/0/" in k else 1.0},
    ),
    "first match wins": (
        {"groups": {"embed/*": 0.5, "**/kernel": 3.0}},
        {"factor": lambda k: 0.5 if "embed" in k else 3.0 if "kernel" in k else 1.0},
    ),
    "options": (
        {"groups": {"embed/**": GroupOptions(0.5, weight_decay=False), "**/bias": GroupOptions(weight_decay=True)}},
        {
            "factor": lambda k: 0.5 if "embed" in k else 1.0,
            "decays": lambda k, p: k.endswith("bias") or (p.ndim >= 2 and "embed" not in k),
        },
    ),
    "everything": (
        {"groups": {"**": GroupOptions(0.25, weight_decay=False)}},
        {"factor": lambda k: 0.25, "decays": lambda k, p: False},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_adamw_in_float64(case):
    """Each option changes exactly what it says, over five steps."""
    given, expected = CASES[case]
    assert_close(run(adamw(1e-2, **given))[0], truth(**expected))


def test_schedules_are_read_at_the_step_before_the_update():
    schedule = wsd(0.05, 5, warmup=2, decay=2)
    assert_close(run(adamw(schedule))[0], truth(lr=lambda t: float(schedule(t))))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_it_is_bitwise_optax(clip):
    """So that a run can move between the two, state included."""
    kwargs = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    chain = [optax.adamw(1e-2, mask=decay_matrices, **kwargs)]
    theirs = optax.chain(*([optax.clip_by_global_norm(clip)] if clip else []), *chain)
    ours = run(adamw(1e-2, clip_norm=clip))
    with jax.numpy_dtype_promotion("standard"):
        other = run(theirs)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), ours[0], other[0])))
    assert [x.tobytes() for x in map(np.asarray, jax.tree.leaves(ours[1]))] == [
        x.tobytes() for x in map(np.asarray, jax.tree.leaves(other[1]))
    ]


def test_the_state_is_a_plain_pytree_and_jit_changes_nothing():
    """It is saved, sharded and donated like the parameters."""
    tx = adamw(1e-2, clip_norm=1.0, groups={"embed/**": 0.1})
    params, state = run(tx)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert len(jax.tree.leaves(state)) == 2 * len(jax.tree.leaves(params)) + 1
    again = jax.tree.unflatten(jax.tree.structure(state), [np.asarray(x) for x in jax.tree.leaves(state)])
    tx.update(tree(9), again, params)
    assert jax.tree.structure(jax.eval_shape(tx.init, params)) == jax.tree.structure(state)
    assert_close(run(tx, jit=False)[0], {k: np.asarray(v) for k, v in flatten(params).items()})


def test_bfloat16_parameters_keep_their_dtype():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    tx = adamw(wsd(1e-2, 10, warmup=0, decay=5), groups={"w": 0.5})
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


def test_patterns_that_match_nothing_are_errors_with_the_nearest_address():
    """A typing error in a pattern would silently decay or not decay."""
    for tx in (adamw(1e-3, groups={"embde/*": 0.1}), adamw(1e-3, decay="embde/*")):
        with pytest.raises(PatternError, match=r"'embde/\*' matches no leaf.*embed/kernel"):
            tx.init(tree(0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"b1": 1.0}, r"b1=1\.0"),
        ({"b2": -0.1}, r"b2=-0\.1"),
        ({"eps": -1.0}, r"eps=-1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"clip_norm": -1.0}, r"clip_norm=-1\.0"),
        ({"groups": {"**": -1.0}}, "factor is finite"),
        ({"groups": {"**": float("nan")}}, "factor is finite"),
    ],
)
def test_numbers_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        adamw(**{"learning_rate": 1e-3, **kwargs})
