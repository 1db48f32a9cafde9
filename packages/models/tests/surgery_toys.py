"""What tests of surgery share: small models with weights that matter, and rows of tokens for them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from model_toys import ENCODERS, MODELS

from dovetail_models import merge, split
from dovetail_protocols import paths

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 10, (2, 6)), jnp.int32)
PIXELS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
INPUTS = {"siglip": (TOKENS, PIXELS)} | dict.fromkeys(("siglip vision", "vit", "classifier"), (PIXELS,))


def made(name: str, seed: int = 0, **options: Any) -> Any:
    """Return a small model by name; biases, norms and corrections are drawn, too, so that none is 0 or 1."""
    kind, config = (MODELS | ENCODERS)[name]
    return drawn(kind(config, rngs=nnx.Rngs(seed), **options), seed)


def drawn(model: Any, seed: int = 0) -> Any:
    """Return a model whose vectors are moved at random."""
    random = np.random.default_rng(seed)
    definition, params = split(model)
    leaves = {a: x for a, x in paths.flatten(params).items() if x.ndim < 2 or a.endswith("_bias")}
    moved = {a: x + jnp.asarray(random.normal(scale=0.3, size=x.shape), x.dtype) for a, x in leaves.items()}
    return merge(definition, paths.update(params, moved))


def encoded(name: str, model: Any) -> Any:
    """Return what an encoder makes of its inputs."""
    return model(*INPUTS.get(name, (TOKENS,)))


def flat(model: Any) -> dict[str, Any]:
    """Return the parameters by address."""
    return {address: np.asarray(value) for address, value in paths.flatten(split(model)[1]).items()}


def replaced(model: Any, leaves: dict[str, Any]) -> Any:
    """Return a model with other values at some addresses."""
    definition, params = split(model)
    return merge(definition, paths.update(params, {a: jnp.asarray(value) for a, value in leaves.items()}))


def same(ours: Any, theirs: Any) -> None:
    """See that two models have the same parameters, bit by bit."""
    a, b = flat(ours), flat(theirs)
    assert a.keys() == b.keys()
    for address, value in a.items():
        np.testing.assert_array_equal(value, b[address], err_msg=address)
