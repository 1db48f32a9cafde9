"""The step: gradients are those of the whole batch, however it is split."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_toys import batch_of, quadratic, regression, tiny

from dovetail_train import init_state, make_step, next_token

KEEP_GRADIENT = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g))


def gradients(loss, params, batch, accumulate, key=None):
    state = init_state(params, KEEP_GRADIENT, key)
    state, metrics = jax.jit(make_step(loss, KEEP_GRADIENT, accumulate=accumulate))(state, batch)
    return state.opt_state, {k: float(v) for k, v in metrics.items()}


def test_gradient_is_the_closed_form_of_both_terms():
    """Breaks when a term is divided by anything but its own weight, or a reported-only term enters the objective."""
    batch, params = regression()
    b = {k: np.asarray(v, np.float64) for k, v in batch.items()}
    w = np.asarray(params["w"], np.float64)
    error = b["x"] @ w - b["y"]
    main = 2 * b["x"].T @ (b["m"] * error) / b["m"].sum()
    size = 2 * b["x"].T @ (b["v"] * (b["x"] @ w)) / b["v"].sum()
    got, metrics = gradients(quadratic, params, batch, 1)
    np.testing.assert_allclose(got["w"], main + size, rtol=1e-5)
    assert metrics["loss"] == pytest.approx((b["m"] * error**2).sum() / b["m"].sum(), rel=1e-5)
    assert metrics["bias"] == pytest.approx(error.mean(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(main + size), rel=1e-5)


@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_accumulation_is_exact_with_unequal_masks_and_auxiliary_loss(count):
    """Breaks when micro-batches are averaged instead of added (the classic accumulation error)."""
    batch, params = regression()
    whole, one = gradients(quadratic, params, batch, 1)
    parts, many = gradients(quadratic, params, batch, count)
    np.testing.assert_allclose(parts["w"], whole["w"], atol=1e-6, rtol=1e-6)
    assert many == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("count", [2, 8])
def test_language_model_accumulation_is_exact(count):
    """The same for a language model on packed rows with masked targets and an auxiliary loss of its own weight."""
    definition, params = tiny()
    loss = next_token(definition, auxiliary={"size": 0.01})
    whole, one = gradients(loss, params, batch_of(0), 1)
    parts, many = gradients(loss, params, batch_of(0), count)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert many == pytest.approx(one, rel=1e-5)


def test_sharded_batch_accumulates_to_the_same_gradient():
    """Breaks when micro-batches of a data-parallel batch lose or repeat rows."""
    batch, params = regression(rows=16)
    whole, _ = gradients(quadratic, params, batch, 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    parts, _ = gradients(quadratic, params, sharded, 2)
    np.testing.assert_allclose(parts["w"], whole["w"], atol=1e-6, rtol=1e-6)


def test_a_batch_without_targets_has_zero_gradient():
    """Breaks as NaN when 0 / 0 reaches the parameters."""
    batch, params = regression()
    batch = batch | {"m": np.zeros(12, np.float32), "v": np.zeros(12, np.float32)}
    got, _ = gradients(quadratic, params, batch, 3)
    np.testing.assert_array_equal(got["w"], np.zeros(3))


def test_keys_depend_on_step_and_micro_batch_alone():
    """Breaks when noise repeats between micro-batches or steps, or differs when a run is repeated."""
    batch, params = regression()

    def noisy(p, b, key):
        out = quadratic(p, b)
        noise = jax.random.normal(key, ())
        return out._replace(sum=out.sum + noise * jnp.sum(p["w"]) * out.weight)

    def twice():
        state = init_state(params, optax.sgd(0.0), jax.random.key(1))
        step = jax.jit(make_step(noisy, optax.sgd(0.0), accumulate=2))
        norms = []
        for _ in range(2):
            state, metrics = step(state, batch)
            norms.append(float(metrics["grad_norm"]))
        return norms

    first = twice()
    assert first == twice()
    assert first[0] != first[1]


@pytest.mark.parametrize(("accumulate", "match"), [(0, "at least 1"), (5, "does not divide the 12 rows")])
def test_bad_accumulation_is_refused(accumulate, match):
    batch, params = regression()
    with pytest.raises(ValueError, match=match):
        gradients(quadratic, params, batch, accumulate)


def test_next_token_equals_float64_cross_entropy():
    """Breaks when masks, targets or segments are read wrongly."""
    definition, params = tiny()
    batch = batch_of(3)
    output = next_token(definition)(params, batch)
    e, head = (np.asarray(params[k], np.float64) for k in ("embedding", "head"))
    total = 0.0
    for row in range(batch.tokens.shape[0]):
        x = e[batch.tokens[row]]
        heads = x.reshape(len(x), 2, -1).transpose(1, 0, 2)
        seg = batch.segment_ids[row]
        keep = (seg[:, None] == seg[None]) & (seg[:, None] != 0) & np.tri(len(x), dtype=bool)
        logits = np.where(keep, heads @ heads.transpose(0, 2, 1) * 0.5, -np.inf)
        with np.errstate(invalid="ignore"):
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p = np.nan_to_num(p / p.sum(-1, keepdims=True))
        h = x + (p @ heads).transpose(1, 0, 2).reshape(x.shape)
        z = h @ head
        nll = np.log(np.exp(z).sum(-1)) - z[np.arange(len(x)), batch.targets[row]]
        total += (nll * batch.loss_weights[row]).sum()
    assert float(output.sum) == pytest.approx(total, rel=1e-5)
    assert float(output.weight) == batch.loss_weights.sum()


def test_unknown_auxiliary_name_lists_the_known_ones():
    definition, params = tiny()
    with pytest.raises(ValueError, match=r"\['balance'\].*\['size'\]"):
        next_token(definition, auxiliary={"balance": 1.0})(params, batch_of(0))
