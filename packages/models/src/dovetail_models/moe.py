"""Mixture of experts: a router, experts, and the block around them (Shazeer et al., arXiv:1701.06538).

Every token reaches all of the experts that it chose, unless experts are given a capacity. The choice of a token depends
on it alone, so that a row computes the same among others as alone.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import Activation, Routing, combine, einsum, gated_product, permute, ragged_dot, sort_by_expert
from dovetail_models.balance import has_sums, real_tokens, router_terms
from dovetail_models.decoder import DecoderConfig
from dovetail_models.layers import ACTIVATION_FUNCTIONS, Initializer, PlainActivation, parameter
from dovetail_models.router import Router, Selection, SparseTraining
from dovetail_models.spread import spread
from dovetail_protocols import Auxiliary, LayerIndex, LowRankArray, QuantizedArray
from dovetail_runtime import constrain, split_of

__all__ = ["BALANCE", "Experts", "PlainExperts", "SparseConfig", "SparseMLP", "Sparsity", "sparse_mlp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What configurations with experts have besides those of a stack of layers, which they derive from, too.

    Attributes:
        experts: how many a sparse layer has.
        top_k: how many a token chooses.
        balanced: the model returns a balancing loss per sequence, see `dovetail_models.balance.router_terms`.
        balance_coef: its coefficient, for the sum over a token's choices and the mean over layers as in transformers:
            alike used experts have a loss of `top_k` times that.
        training: what training adds, which checkpoints do not tell.
    """

    experts: int
    top_k: int
    balanced: bool = False
    balance_coef: float = 0.001
    training: SparseTraining = dataclasses.field(default_factory=SparseTraining)

    def __post_init__(self) -> None:
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue] - of the stack
        if not 0 < self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k}; expected between 1 and the {self.experts} experts")
        if not 0 <= self.balance_coef < math.inf:
            raise ValueError(f"balance_coef={self.balance_coef}; expected a number of at least 0")

    @property
    def select(self) -> Selection:
        """How tokens choose experts."""
        balance = self.top_k * self.balance_coef if self.balanced else 0.0
        return Selection(experts=self.experts, top_k=self.top_k, balance=balance, training=self.training)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig(Sparsity, DecoderConfig):
    """What families of decoders with experts share; see `Sparsity` and `DecoderConfig`."""


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

    into: ClassVar[tuple[str, ...]] = ("gate", "up")
    """The products whose results are hidden units."""

    def __init__(
        self,
        features: int,
        hidden: int,
        count: int,
        *,
        activation: Activation | PlainActivation = "silu",
        bias: bool = False,
        init: Initializer,
        out_init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        for name in (*self.into, "down"):
            last = name == "down"
            sizes, axes = ((hidden, features), ("mlp", "embed")) if last else ((features, hidden), ("embed", "mlp"))
            made = parameter(rngs, (count, *sizes), ("experts", *axes), out_init if last else init, dtype, 1)
            setattr(self, name, made)
            if bias:
                zeros = nnx.initializers.zeros
                setattr(self, f"{name}_bias", parameter(rngs, (count, sizes[1]), ("experts", axes[1]), zeros, dtype))
        self.activation: Any = activation
        self.bias = bias

    def __call__(
        self, rows: Float[Array, "rows features"], group_sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows features"]:
        """Transform each row by the expert of its group: the first ``group_sizes[0]`` by the first one, and so on."""

        def product(name: str, rows: jax.Array) -> jax.Array:
            weight = getattr(self, name).get_value()
            weight = weight if isinstance(weight, QuantizedArray | LowRankArray) else weight.astype(rows.dtype)
            y = ragged_dot(rows, weight, group_sizes)
            if not self.bias:
                return y
            bias = getattr(self, f"{name}_bias").get_value().astype(rows.dtype)
            return y + jnp.repeat(bias, group_sizes, axis=0, total_repeat_length=rows.shape[0])

        return product("down", self._inner(product, rows))

    def batched(self, rows: Float[Array, "experts rows features"]) -> Float[Array, "experts rows features"]:
        """Transform as many rows by each expert."""

        def product(name: str, rows: jax.Array) -> jax.Array:
            y = einsum("erd,edf->erf", rows, getattr(self, name).get_value())
            return y + getattr(self, f"{name}_bias").get_value().astype(y.dtype)[:, None] if self.bias else y

        return product("down", self._inner(product, rows))

    def _inner(self, product: Callable[[str, jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
        return gated_product(product("gate", rows), product("up", rows), activation=self.activation)


class PlainExperts(Experts):
    """MLPs without gates, one for each group of rows; see `MLP` for their activations, and `Experts`."""

    into: ClassVar[tuple[str, ...]] = ("up",)

    def _inner(self, product: Callable[[str, jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
        return ACTIVATION_FUNCTIONS[self.activation](product("up", rows))


class SparseMLP(nnx.Module):
    """Each token's weighted sum of the experts that it chose, plus what a shared MLP makes of every token.

    Args:
        router: chooses.
        experts: of the same number.
        shared: an MLP for all tokens; None for none.
    """

    routes: ClassVar[bool] = True

    def __init__(self, router: Router, experts: Experts, shared: Any = None) -> None:
        self.router, self.experts, self.shared = router, experts, shared

    def __call__(
        self, layer: LayerIndex, x: Float[Array, "tokens features"], mixer: Any
    ) -> tuple[jax.Array, Auxiliary, Any]:
        """Return what becomes of each token, what `router_terms` tells, and the mixer.

        With a capacity, where the mixer has sums of sequences as in training, ``router/dropped_per_micro_batch`` is the
        share of choices without a row.
        """
        logits, routing, mixer = self.router(layer, x, mixer)
        aux = dict(router_terms(self.router, logits, routing, mixer))
        training = self.router.select.training
        if training.capacity is not None and has_sums(mixer, x.shape[0]):
            y, aux["router/dropped_per_micro_batch"] = self._limited(x, routing, mixer)
        elif split_of("experts") is not None:
            y = spread(self.experts, x, routing, exchange=training.exchange or "all_to_all")
        else:
            dispatch = sort_by_expert(routing.experts, self.router.select.experts)
            rows = self.experts(permute(x, dispatch), dispatch.group_sizes)
            y = combine(rows, routing.weights, dispatch)
        return y if self.shared is None else y + self.shared(x), aux, mixer

    def _limited(self, x: jax.Array, routing: Routing, mixer: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Return what becomes of each token where experts have a capacity, and how many choices have no row."""
        select = self.router.select
        live = real_tokens(mixer, x.shape[0])
        rows = select.training.rows(routing.experts.size, select.experts)
        dispatch = sort_by_expert(routing.experts, select.experts, capacity=rows, where=live)
        batches = permute(x, dispatch).reshape(select.experts, rows, -1)
        batches = self.experts.batched(constrain(batches, "experts", None, "embed"))
        y = combine(batches.reshape(-1, batches.shape[-1]), routing.weights, dispatch)
        lost = jnp.sum((live[:, None] & dispatch.dropped).astype(routing.scores.dtype))
        return y, (lost, select.top_k * jnp.sum(live.astype(lost.dtype)))
