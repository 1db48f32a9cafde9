"""Losses of dovetail_kernels against torch's, and the contrastive one against CLIP's of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from dovetail_kernels import (
    CrossEntropyOptions,
    Teacher,
    configured,
    contrastive_loss,
    distillation_loss,
    linear_cross_entropy,
    token_logprobs,
)

SMALL = configured("blocked", chunk=7, bands=2)
ROWS, FEATURES, VOCAB = 23, 6, 37


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def both(own, theirs, inputs):
    """Compare the losses, and their gradients where torch's inputs are differentiated."""
    loss, gradients = jax.value_and_grad(own, argnums=tuple(range(len(inputs))))(*map(jnp.asarray, inputs))
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    expected = theirs(*tensors)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-6)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=2e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("implementation", [SMALL, "reference"], ids=["blocked", "reference"])
def test_cross_entropy(smoothing, reduction, implementation):
    """Ignored targets and label smoothing mean what they mean in torch."""
    inputs = arrays((ROWS, FEATURES), (FEATURES, VOCAB), (VOCAB,))
    targets = np.random.default_rng(1).integers(0, VOCAB, ROWS)
    targets[::5] = -100
    factors = np.random.default_rng(2).random(ROWS, np.float32)

    def own(hidden, weight, bias):
        options = CrossEntropyOptions(label_smoothing=smoothing, per_token=reduction == "none")
        loss = linear_cross_entropy(
            hidden,
            weight,
            jnp.asarray(targets, jnp.int32),
            ignore_index=-100,
            bias=bias,
            options=options,
            implementation=implementation,
        )
        return loss if reduction == "sum" else jnp.sum(loss * factors)

    def theirs(hidden, weight, bias):
        loss = F.cross_entropy(
            hidden @ weight + bias, torch.tensor(targets), label_smoothing=smoothing, reduction=reduction
        )
        return loss if reduction == "sum" else torch.sum(loss * torch.tensor(factors))

    both(own, theirs, inputs)


def test_weights_per_class():
    """A weight per class is a weight per row: that of its target."""
    inputs = arrays((ROWS, FEATURES), (FEATURES, VOCAB))
    targets = np.random.default_rng(1).integers(0, VOCAB, ROWS)
    classes = np.random.default_rng(2).random(VOCAB, np.float32)

    def own(hidden, weight):
        weights = jnp.asarray(classes)[targets]
        return linear_cross_entropy(hidden, weight, jnp.asarray(targets, jnp.int32), loss_weights=weights)

    def theirs(hidden, weight):
        return F.cross_entropy(hidden @ weight, torch.tensor(targets), torch.tensor(classes), reduction="sum")

    both(own, theirs, inputs)


def test_token_logprobs():
    """Log-probabilities and entropies are those of torch's categorical distribution."""
    inputs = arrays((ROWS, FEATURES), (FEATURES, VOCAB))
    tokens = np.random.default_rng(1).integers(0, VOCAB, ROWS)

    def own(hidden, weight):
        found = token_logprobs(
            hidden, weight, jnp.asarray(tokens, jnp.int32), temperature=0.7, entropy=True, implementation=SMALL
        )
        return jnp.sum(found.logprobs * 2 + found.entropy)

    def theirs(hidden, weight):
        categorical = torch.distributions.Categorical(logits=hidden @ weight / 0.7)
        return torch.sum(categorical.log_prob(torch.tensor(tokens)) * 2 + categorical.entropy())

    both(own, theirs, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation(beta):
    """Divergences are sums of torch's kl_div."""
    inputs = arrays((ROWS, FEATURES), (FEATURES, VOCAB))
    hidden_t, weight_t = arrays((ROWS, 4), (4, VOCAB), seed=1)

    def own(hidden, weight):
        teacher = Teacher(jnp.asarray(hidden_t), jnp.asarray(weight_t))
        return distillation_loss(hidden, weight, teacher, beta=beta, temperature=1.5, implementation=SMALL)

    def divergence(p, q):
        return F.kl_div(q, p, reduction="sum", log_target=True)

    def theirs(hidden, weight):
        q = F.log_softmax(hidden @ weight / 1.5, -1)
        p = F.log_softmax(torch.tensor(hidden_t) @ torch.tensor(weight_t) / 1.5, -1)
        if beta in (0, 1):
            return divergence(p, q) if beta == 0 else divergence(q, p)
        middle = torch.log(beta * p.exp() + (1 - beta) * q.exp())
        return beta * divergence(p, middle) + (1 - beta) * divergence(q, middle)

    both(own, theirs, inputs)


def test_contrastive():
    """Text and image towers of CLIP train with the loss of transformers, its learned scale included."""
    inputs = [*arrays((ROWS, FEATURES), (ROWS, FEATURES)), np.float32(1.3)]

    def own(texts, images, scale):
        return contrastive_loss(texts, images, scale=scale, implementation=SMALL) / ROWS

    both(own, lambda texts, images, scale: image_text_contrastive_loss(texts @ images.T * scale), inputs)
