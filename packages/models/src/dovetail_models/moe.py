"""Mixture of experts: a router, experts, and the block around them (Shazeer et al., arXiv:1701.06538).

Every token reaches all of the experts that it chose; nothing is dropped. The choice of a token depends on it alone, so
that a row computes the same among others as alone. The balancing loss is additive, too: it is made of each sequence's
own counts (DeepSeek-V3, arXiv:2412.19437, eq. 17-20) and weighed with the sequence's tokens, never of the counts of a
whole batch, whose loss would depend on what else is in it.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import (
    Activation,
    Dispatch,
    ExpertGroups,
    Routing,
    combine,
    einsum,
    gated_product,
    permute,
    ragged_dot,
    route,
    sort_by_expert,
)
from dovetail_models.decoder import Block, DecoderConfig
from dovetail_models.layers import Initializer, exact, parameter
from dovetail_protocols import Auxiliary, QuantizedArray

__all__ = [
    "BALANCE",
    "Experts",
    "Router",
    "Selection",
    "SparseBlock",
    "SparseConfig",
    "SparseMLP",
    "balance_loss",
    "sparse_mlp",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """How tokens choose experts; see `dovetail_kernels.route`.

    Attributes:
        experts: how many there are.
        top_k: how many a token chooses.
        scoring: how logits become scores.
        renormalize: the weights of a token's experts sum to 1.
        scale: factor of the weights.
        groups: a token chooses groups of experts first.
        bias: the logits have biases.
        correction: scores are corrected for the choice only, by numbers that an optimizer has no gradient for.
        balance: coefficient of the balancing loss, which is 1 where all experts are used alike; 0 for none.
    """

    experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: ExpertGroups | None = None
    bias: bool = False
    correction: bool = False
    balance: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig(DecoderConfig):
    """What families of decoders with experts share; see `DecoderConfig` for the others.

    Attributes:
        experts: how many a sparse layer has.
        top_k: how many a token chooses.
        balanced: the model returns a balancing loss, see `balance_loss`.
        balance_coef: its coefficient, for the sum over a token's choices as in transformers: alike used experts have a
            loss of `top_k` times that.
    """

    experts: int
    top_k: int
    balanced: bool = False
    balance_coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k}; expected between 1 and the {self.experts} experts")
        if not 0 <= self.balance_coef < math.inf:
            raise ValueError(f"balance_coef={self.balance_coef}; expected a number of at least 0")

    @property
    def select(self) -> Selection:
        """How tokens choose experts."""
        balance = self.top_k * self.balance_coef if self.balanced else 0.0
        return Selection(experts=self.experts, top_k=self.top_k, balance=balance)


BALANCE = {
    "output_router_logits": ("balanced", bool, False),
    "router_aux_loss_coef": ("balance_coef", float, 0.001),
}
"""Their fields of the balancing loss: transformers adds it where it is asked to return the router's logits."""


def sparse_mlp(config: Any, hidden: int, *, shared: Any = None, **options: Any) -> "SparseMLP":
    """Return the sparse MLP of a configuration.

    Args:
        config: with ``features`` and ``select``.
        hidden: width of each expert.
        shared: see `SparseMLP`.
        options: of `Experts`, and what `Decoder.block` is given.
    """
    weights = {name: options[name] for name in ("init", "dtype", "rngs")}
    router = Router(config.features, config.select, **weights)
    return SparseMLP(router, Experts(config.features, hidden, config.select.experts, **options), shared)


class Router(nnx.Module):
    """Scores of experts, in float32 (float64 for float64) whatever the dtype of activations.

    Args:
        features: width of the residual stream.
        select: how tokens choose.
        init: of the weight.
        dtype: of the parameters; that of the correction is float32.
        rngs: where the initial weights come from.
    """

    def __init__(self, features: int, select: Selection, *, init: Initializer, dtype: Any, rngs: nnx.Rngs) -> None:
        zeros, count = nnx.initializers.zeros, select.experts
        self.weight = parameter(rngs, (features, count), ("embed", "experts"), init, dtype, 1)
        if select.bias:
            self.bias = parameter(rngs, (count,), ("experts",), zeros, dtype)
        if select.correction:
            self.correction = parameter(rngs, (count,), ("experts",), zeros, jnp.float32)
        self.select = select

    def __call__(self, x: Float[Array, "tokens features"]) -> Routing:
        """Return each token's experts and their weights."""
        select = self.select
        logits = einsum("td,de->te", x.astype(exact(x)), self.weight.get_value())
        return route(
            logits + self.bias.get_value().astype(logits.dtype) if select.bias else logits,
            select.top_k,
            scoring=select.scoring,
            bias=self.correction.get_value() if select.correction else None,
            groups=select.groups,
            renormalize=select.renormalize,
            scale=select.scale,
        )


class Experts(nnx.Module):
    """Gated MLPs, one for each group of rows; see `GatedMLP`. Weights are ``[experts, in, out]``.

    Args:
        features: width of the residual stream.
        hidden: width of each expert.
        count: how many.
        activation: of the gate.
        bias: of all three products.
        init: of the weights.
        out_init: of the last ones.
        dtype: of the parameters.
        rngs: where the initial weights come from.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        count: int,
        *,
        activation: Activation = "silu",
        bias: bool = False,
        init: Initializer,
        out_init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        into, out = (count, features, hidden), (count, hidden, features)
        self.gate = parameter(rngs, into, ("experts", "embed", "mlp"), init, dtype, 1)
        self.up = parameter(rngs, into, ("experts", "embed", "mlp"), init, dtype, 1)
        self.down = parameter(rngs, out, ("experts", "mlp", "embed"), out_init, dtype, 1)
        if bias:
            zeros = nnx.initializers.zeros
            self.gate_bias = parameter(rngs, (count, hidden), ("experts", "mlp"), zeros, dtype)
            self.up_bias = parameter(rngs, (count, hidden), ("experts", "mlp"), zeros, dtype)
            self.down_bias = parameter(rngs, (count, features), ("experts", "embed"), zeros, dtype)
        self.activation: Activation = activation
        self.bias = bias

    def __call__(
        self, rows: Float[Array, "rows features"], group_sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows features"]:
        """Transform each row by the expert of its group: the first ``group_sizes[0]`` by the first one, and so on."""
        gate, up = self._product("gate", rows, group_sizes), self._product("up", rows, group_sizes)
        return self._product("down", gated_product(gate, up, activation=self.activation), group_sizes)

    def _product(self, name: str, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        weight = getattr(self, name).get_value()
        weight = weight if isinstance(weight, QuantizedArray) else weight.astype(rows.dtype)
        y = ragged_dot(rows, weight, group_sizes)
        if not self.bias:
            return y
        bias = getattr(self, f"{name}_bias").get_value().astype(rows.dtype)
        return y + jnp.repeat(bias, group_sizes, axis=0, total_repeat_length=rows.shape[0])


class SparseMLP(nnx.Module):
    """Each token's weighted sum of the experts that it chose, plus what a shared MLP makes of every token.

    Args:
        router: chooses.
        experts: of the same number.
        shared: an MLP for all tokens; None for none.
    """

    def __init__(self, router: Router, experts: Experts, shared: Any = None) -> None:
        self.router, self.experts, self.shared = router, experts, shared

    def __call__(self, x: Float[Array, "tokens features"], mixer: Any) -> tuple[jax.Array, Auxiliary]:
        """Return what becomes of each token, and ``loss/balance`` where one is asked for."""
        routing = self.router(x)
        dispatch = sort_by_expert(routing.experts, self.router.select.experts)
        y = combine(self._transform(x, dispatch), routing.weights, dispatch)
        y = y if self.shared is None else y + self.shared(x)
        balance = self.router.select.balance
        return y, {"loss/balance": balance_loss(routing, mixer, balance)} if balance else {}

    def _transform(self, x: jax.Array, dispatch: Dispatch) -> jax.Array:
        return self.experts(permute(x, dispatch), dispatch.group_sizes)


def balance_loss(routing: Routing, mixer: Any, coefficient: float) -> tuple[jax.Array, jax.Array]:
    """Return the sum and the weight of a balancing loss per sequence, see the head of this module.

    For a sequence of n tokens it is ``n * experts * sum(counts / (n * top_k) * probabilities)``, with the number of
    tokens that chose each expert and its mean share of the scores; its weight is n.

    Args:
        routing: of the tokens.
        mixer: knows the sequences, see `dovetail_protocols.Mixer.totals`.
        coefficient: of the loss.
    """
    count, top_k = routing.scores.shape[1], routing.experts.shape[1]
    total = jnp.sum(routing.scores, axis=1, keepdims=True)
    shares = routing.scores / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
    chosen = jnp.sum(jax.nn.one_hot(routing.experts, count, dtype=shares.dtype), axis=1)
    counts, shares, tokens = (mixer.totals(x) for x in (chosen, shares, jnp.ones_like(shares[:, :1])))
    losses = jnp.sum(counts * shares, axis=1) / jnp.maximum(tokens[:, 0], 1) * (count / top_k)
    return coefficient * jnp.sum(losses), jnp.sum(tokens)


class SparseBlock(Block):
    """A `Block` whose MLP is a `SparseMLP`."""

    def transform(self, x: jax.Array, mixer: Any) -> tuple[jax.Array, Auxiliary]:
        """See `Block.transform`."""
        return self.mlp(x, mixer)
