"""Losses of language models, built on `dovetail_kernels`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dovetail_kernels import DenseMixer, Wanted, linear_cross_entropy
from dovetail_protocols import LMBatch, LossOutput, Term

__all__ = ["next_token"]


def next_token(
    definition: Any,
    *,
    auxiliary: Mapping[str, float] | None = None,
    attention: Wanted = None,
) -> Callable[[Any, LMBatch], LossOutput]:
    """Return the next-token cross-entropy of a language model as ``loss(params, batch)``, in nats.

    The logits of the whole batch never exist (`dovetail_kernels.linear_cross_entropy`).

    Args:
        definition: the static part of an NNX module that meets `dovetail_protocols.LanguageModel`, as from
            ``nnx.split(model)[0]``.
        auxiliary: coefficients of the model's auxiliary losses by name; those not named are reported only.
        attention: implementation of the dense mixer.

    Raises:
        ValueError: from the loss, when `auxiliary` names a loss that the model does not return.
    """
    coefficients = dict(auxiliary or {})

    def loss(params: Any, batch: LMBatch) -> LossOutput:
        model = nnx.merge(definition, params)
        mixer = DenseMixer.of(batch.tokens, batch.segment_ids, implementation=attention)
        hidden, aux, _ = model.hidden(batch.tokens.reshape(-1), batch.positions.reshape(-1), mixer)
        weight, bias, softcap = model.unembedding()
        weights = batch.loss_weights.reshape(-1)
        total = linear_cross_entropy(
            hidden, weight, batch.targets.reshape(-1), loss_weights=weights, bias=bias, softcap=softcap
        )
        return LossOutput(total, jnp.sum(weights), _terms(aux, coefficients))

    return loss


def _terms(aux: Mapping[str, Any], coefficients: Mapping[str, float]) -> dict[str, Term]:
    unknown = sorted(set(coefficients) - set(aux))
    if unknown:
        raise ValueError(f"auxiliary names {unknown}; the model returns {sorted(aux) or 'no auxiliary losses'}")
    terms = {name: Term(*pair) for name, pair in aux.items() if name not in coefficients}
    for name, factor in coefficients.items():
        total, weight = aux[name]
        terms[f"loss/{name}"] = Term(factor * total, weight)
    return terms
