"""Maximal update parametrisation: what is tuned on a narrow model holds for a wide one (Yang et al., arXiv:2203.03466).

The form of their Table 3 for Adam: initial weights and learning rates change with the width, and the forward does not,
so that the model stays a plain one. Against the base, a weight with ``i`` times as many inputs is

- hidden, where both grew: standard deviation ``i ** -0.5``, learning rate ``1 / i``;
- an output, where only its inputs grew (the unembedding, routers, latents of fixed size): ``1 / i`` and ``1 / i``;
- an input, where at most its outputs grew (embeddings; norms, biases, convolutions of single channels): 1 and 1.
"""

import dataclasses
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from dovetail_models.decoder import Decoder
from dovetail_models.layers import leading_axes, without_values
from dovetail_models.stack import Stack

__all__ = ["maximal_update"]

D = TypeVar("D", bound=Decoder)

WIDTHS = frozenset(
    [
        *("features", "hidden", "heads", "kv_heads", "expert_hidden", "shared_hidden", "query_rank", "latent_dim"),
        *("key_heads", "value_heads", "groups"),
    ]
)
"""Fields in which a model and its base may differ; the size of heads may not, which attention's scale goes with."""


class _Factors(NamedTuple):
    """What multiplies the base's standard deviation and learning rate."""

    std: float
    rate: float


def maximal_update(model: D, *, base: Any) -> tuple[D, dict[Any, Any]]:
    """Return a model with the initial weights of muP, and the factors of its parameters' learning rates.

    The learning rate (and all else that was tuned) of the base then suits the model, whatever its width. Adam's
    updates are to be multiplied with the factors; weight decay is not, if it is to mean the same at every width.

    Args:
        model: with its first weights, abstract or not.
        base: the configuration at the width where hyperparameters are tuned. It differs in widths alone: of the
            residual stream, MLPs and experts, latents, and in the number of heads. For a model of these widths nothing
            changes.

    Returns:
        The model, and a tree of numbers like the parameters of `dovetail_models.split`.

    Raises:
        TypeError: `model` is no `Decoder`, or `base` configures another family.
        ValueError: `base` differs in something else, such as the features per head; or the unembedding is tied to the
            embedding, which would need a multiplier in the forward.

    >>> from dovetail_models import Llama, LlamaConfig
    >>> base = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2)
    >>> wide = dataclasses.replace(base, features=32, hidden=64, heads=8)
    >>> _, rates = maximal_update(Llama(wide, rngs=nnx.Rngs(0)), base=base)
    >>> rates["embedding"], rates["layers"][0]["mlp"]["up"], rates["head"]
    (1.0, 0.25, 0.25)
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"{type(model).__name__} is no Decoder; muP is there for language models")
    _check(model.config, base)
    build, scan = type(model), isinstance(model.layers, Stack)
    small = nnx.split(without_values(build, base, scan=scan))[1]
    shapes = {path: variable.get_value().shape for path, variable in nnx.to_flat_state(small)}
    definition, state = nnx.split(model)
    weights, rates = dict[Any, Any](), dict[Any, Any]()
    for path, variable in nnx.to_flat_state(state):
        value, metadata = variable.get_value(), variable.get_metadata()
        found = _factors(value.shape, shapes[path], metadata["axes"], metadata.get("inputs", 0))
        if path == ("embedding",):
            found = _Factors(*(x * base.embedding_scale / model.config.embedding_scale for x in found))
        weights[path], rates[path] = variable.replace(_scaled(value, found.std)), variable.replace(found.rate)
    made = nnx.merge(definition, nnx.from_flat_state(weights.items()))
    return made, nnx.to_pure_dict(nnx.from_flat_state(rates.items()))


def _factors(shape: tuple[int, ...], base: tuple[int, ...], axes: tuple[str | None, ...], inputs: int) -> _Factors:
    """Return what a weight's shape and that of the base's make of it, see the head of this module."""
    first = leading_axes(axes, inputs)
    grown = [now / then for now, then in zip(shape, base, strict=True)]
    into, out = math.prod(grown[first : first + inputs]), math.prod(grown[first + inputs :])
    return _Factors(into**-0.5 if out != 1 else 1 / into, 1 / into)


def _scaled(value: Any, factor: float) -> Any:
    if factor == 1 or isinstance(value, jax.ShapeDtypeStruct):
        return value
    return value * jnp.asarray(factor, value.dtype)


def _check(config: Any, base: Any) -> None:
    if type(config) is not type(base):
        raise TypeError(f"base is {type(base).__name__}; expected {type(config).__name__}, as the model has")
    if config.tied or base.tied:
        raise ValueError(
            f"tied={config.tied}, base.tied={base.tied}; a matrix that embeds and unembeds needs a multiplier in the "
            "forward, expected tied=False"
        )
    fields = {field.name for field in dataclasses.fields(config)} - WIDTHS - {"head_dim"}
    names = sorted(fields | ({"dim"} if hasattr(config, "dim") else {"head_dim"}))
    other = [f"{name}={getattr(config, name)!r} and base.{name}={getattr(base, name)!r}" for name in names
             if getattr(config, name) != getattr(base, name)]  # fmt: skip
    if other:
        raise ValueError(f"{'; '.join(other)}; expected a base that differs in widths alone: {sorted(WIDTHS)}")
