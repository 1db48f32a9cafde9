"""The loss kit accepts a good loss and rejects each named broken one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_protocols import (
    LossOutput,
    Term,
    split_rows,
)
from dovetail_protocols.testing import (
    ConformanceError,
    check_loss,
)

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), jnp.float32), "scale": jnp.float32(1.5)}
WEIGHTS = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0.5, 1]], np.float32)
BATCH = jax.tree.map(jnp.asarray, split_rows(np.random.default_rng(1).integers(0, 5, (3, 5)), loss_weights=WEIGHTS))


def good_loss(params, batch):
    logits = params["w"][batch.tokens] * params["scale"]
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    weights = batch.loss_weights
    balance = jnp.sum(jnp.mean(logits**2, axis=(1, 2)))
    right = jnp.sum(jnp.where(logits.argmax(-1) == batch.targets, weights, 0.0))
    aux = {"loss/balance": Term(balance, jnp.float32(len(weights))), "accuracy": Term(right, weights.sum())}
    return LossOutput(-jnp.sum(logp * weights), weights.sum(), aux)


def pre_divided_mean(params, batch):
    out = good_loss(params, batch)
    return out._replace(sum=out.sum / jnp.maximum(out.weight, 1))


def mean_with_weight_one(params, batch):
    return pre_divided_mean(params, batch)._replace(weight=jnp.float32(1))


def weight_depends_on_params(params, batch):
    out = good_loss(params, batch)
    confident = jax.nn.softmax(params["w"][batch.tokens]).max(-1) > 0.5
    return out._replace(weight=jnp.sum(jnp.where(confident, batch.loss_weights, 0.0)) + jnp.sum(batch.loss_weights))


def aux_is_a_batch_mean(params, batch):
    out = good_loss(params, batch)
    term = out.aux["loss/balance"]
    return out._replace(aux={**out.aux, "loss/balance": Term(term.sum / term.weight, jnp.float32(1))})


def aux_across_rows(params, batch):
    """The batch-level form of router balancing: a square of a sum over rows."""
    out = good_loss(params, batch)
    return out._replace(aux={"loss/balance": Term(jnp.sum(params["w"][batch.tokens]) ** 2, out.weight)})


def aux_weight_depends_on_params(params, batch):
    out = good_loss(params, batch)
    return out._replace(aux={"accuracy": Term(out.sum, out.weight + jnp.sum(params["w"]) * len(batch.tokens))})


def gradient_is_nan(params, batch):
    out = good_loss(params, batch)
    distance = jnp.sum(jnp.sqrt((params["scale"] - params["scale"]) ** 2) * batch.loss_weights)
    return out._replace(sum=out.sum + distance)


def aux_gradient_is_nan(params, batch):
    out = good_loss(params, batch)
    bad = jnp.sqrt(params["scale"] - params["scale"]) * len(batch.tokens)
    return out._replace(aux={"loss/bad": Term(bad, out.weight)})


def counts_masked_targets(params, batch):
    out = good_loss(params, batch)
    return out._replace(weight=jnp.float32(batch.tokens.size))


def learns_masked_targets(params, batch):
    return good_loss(params, batch._replace(loss_weights=jnp.ones_like(batch.loss_weights)))


def sum_per_row(params, batch):
    return good_loss(params, batch)._replace(weight=batch.loss_weights.sum(1))


def plain_tuple(params, batch):
    return tuple(good_loss(params, batch))


def infinite(params, batch):
    return good_loss(params, batch)._replace(sum=jnp.float32(np.inf))


COUNTER = [0]


def remembers(params, batch):
    COUNTER[0] += 1
    return good_loss(params, batch)._replace(sum=good_loss(params, batch).sum + COUNTER[0])


def names_depend_on_the_batch(params, batch):
    out = good_loss(params, batch)
    return out._replace(aux={f"rows_{len(batch.tokens)}": Term(out.sum, out.weight)})


LOSSES = [
    pre_divided_mean,
    mean_with_weight_one,
    weight_depends_on_params,
    aux_is_a_batch_mean,
    aux_across_rows,
    aux_weight_depends_on_params,
    gradient_is_nan,
    aux_gradient_is_nan,
    counts_masked_targets,
    learns_masked_targets,
    sum_per_row,
    plain_tuple,
    infinite,
    remembers,
    names_depend_on_the_batch,
]


def test_a_good_loss_passes():
    check_loss(good_loss, PARAMS, BATCH)


@pytest.mark.parametrize("mutant", LOSSES, ids=lambda f: f.__name__)
def test_broken_losses_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="Loss: "):
        check_loss(mutant, PARAMS, BATCH)


def test_one_row_is_not_enough():
    with pytest.raises(ValueError, match="at least two"):
        check_loss(good_loss, PARAMS, jax.tree.map(lambda leaf: leaf[:1], BATCH))
