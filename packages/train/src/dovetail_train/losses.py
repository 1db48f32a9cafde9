"""Losses of language models, built on `dovetail_kernels`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dovetail_kernels import DenseMixer, Wanted, linear_cross_entropy
from dovetail_protocols import LMBatch, LossOutput, Term, add_auxiliary
from dovetail_runtime import split_of

__all__ = ["next_token"]


def next_token(
    definition: Any,
    *,
    auxiliary: Mapping[str, float] | None = None,
    ahead: Sequence[float] = (),
    attention: Wanted = None,
) -> Callable[[Any, LMBatch], LossOutput]:
    """Return the next-token cross-entropy of a language model as ``loss(params, batch)``, in nats.

    The logits of the whole batch never exist (`dovetail_kernels.linear_cross_entropy`). Tokens go to the experts of
    `LMBatch.choices` where there are any.

    Args:
        definition: the static part of an NNX module that meets `dovetail_protocols.LanguageModel`, as from
            ``nnx.split(model)[0]``.
        auxiliary: coefficients of the model's auxiliary losses by name; those not named are reported only.
        ahead: coefficients of the losses of heads that look further ahead (DeepSeek-V3, arXiv:2412.19437, 2.2), as
            terms ``loss/ahead_0`` and so on. The model has ``look_ahead(hidden, following, positions, mixer, head=)``,
            whose head k predicts the token k + 2 places on; it counts where that is of the same segment.
        attention: implementation of the dense mixer.

    Raises:
        ValueError: from the loss, when `auxiliary` names a loss that the model does not return.
        TypeError: `ahead` for a model without such heads.
    """
    coefficients = dict(auxiliary or {})

    def loss(params: Any, batch: LMBatch) -> LossOutput:
        model = nnx.merge(definition, params)
        if ahead and not hasattr(model, "look_ahead"):
            raise TypeError(f"ahead={tuple(ahead)}, but {type(model).__qualname__} has no look_ahead; leave ahead out")
        options: dict[str, Any] = {"implementation": attention, "ring": split_of("time")}
        mixer = DenseMixer.of(batch.tokens, batch.segment_ids, choices=_choices(batch), **options)
        positions = batch.positions.reshape(-1)
        weight, bias, softcap = model.unembedding()

        def entropy(hidden: Any, targets: Any, weights: Any) -> Term:
            flat = targets.reshape(-1), weights.reshape(-1)
            total = linear_cross_entropy(hidden, weight, flat[0], loss_weights=flat[1], bias=bias, softcap=softcap)
            return Term(total, jnp.sum(flat[1]))

        hidden, aux, _ = model.hidden(batch.tokens.reshape(-1), positions, mixer)
        main = entropy(hidden, batch.targets, batch.loss_weights)
        further: dict[str, Term] = {}
        for head, factor in enumerate(ahead):
            following, _ = _later(batch, head)
            hidden, more, _ = model.look_ahead(hidden, following.reshape(-1), positions, mixer, head=head)
            aux = add_auxiliary(aux, more)
            term = entropy(hidden, *_later(batch, head + 1))
            further[f"loss/ahead_{head}"] = Term(factor * term.sum, term.weight)
        return LossOutput(main.sum, main.weight, _terms(aux, coefficients) | further)

    return loss


def _choices(batch: LMBatch) -> Any:
    """Return the experts of all tokens as a mixer takes them, ``[layers, batch * time, k]``."""
    if batch.choices is None:
        return None
    return jnp.moveaxis(jnp.reshape(batch.choices, (-1, *batch.choices.shape[2:])), 1, 0)


def _later(batch: LMBatch, count: int) -> tuple[Any, Any]:
    """Return the targets so many places later and their weights: 0 beyond the end of a segment or row."""

    def shifted(x: Any) -> Any:
        return jnp.pad(x[:, count:], ((0, 0), (0, min(count, x.shape[1]))))

    same = shifted(batch.segment_ids) == batch.segment_ids
    return shifted(batch.targets), jnp.where(same, shifted(batch.loss_weights), 0)


def _terms(aux: Mapping[str, Any], coefficients: Mapping[str, float]) -> dict[str, Term]:
    unknown = sorted(set(coefficients) - set(aux))
    if unknown:
        raise ValueError(f"auxiliary names {unknown}; the model returns {sorted(aux) or 'no auxiliary losses'}")
    terms = {name: Term(*pair) for name, pair in aux.items() if name not in coefficients}
    for name, factor in coefficients.items():
        total, weight = aux[name]
        terms[f"loss/{name}"] = Term(factor * total, weight)
    return terms
