"""Router: which experts tokens go to, and what training adds to that."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import ExpertGroups, Routing, einsum, route
from dovetail_models.layers import Initializer, exact, parameter
from dovetail_protocols import LayerIndex

__all__ = ["Router", "Selection", "SparseTraining"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseTraining:
    """How experts are trained, besides the balancing loss per sequence; checkpoints do not tell.

    What is per micro-batch depends on what else is in one: the sums of micro-batches are not those of a batch. Losses
    are means over the layers with experts, as transformers' are; where a paper adds up those of the layers, its
    coefficient is to be multiplied with their number.

    Attributes:
        z_coef: coefficient of the mean squared log-sum-exp of a token's logits (ST-MoE, arXiv:2202.08906, eq. 5).
        switch_coef: coefficient of the balancing loss over all tokens of a micro-batch (Switch Transformer,
            arXiv:2101.03961, eq. 4), which is 1 where experts are used alike.
        correct: the router's correction has a gradient, the surplus of tokens of each expert, for an optimizer that
            takes its sign (arXiv:2408.15664, algorithm 1), such as ``optax.sign_sgd(1e-3)``. It is that of no loss, yet
            in the norm of all gradients, as a step's ``grad_norm`` is: what clips belongs into the group of the other
            parameters.
        capacity: the most rows of an expert per micro-batch, relative to those of balanced experts that padding goes
            to as well; the choices of the last tokens beyond that are dropped (GShard, arXiv:2006.16668). None drops
            nothing, and who serves never does.
        statistics: tell how routers choose, see `dovetail_models.balance.router_terms`.
        exchange: how tokens reach experts on other devices, see `dovetail_kernels.expert_parallel`; None for
            "all_to_all", and with a capacity, which has rooms of one size that a mesh divides.
    """

    z_coef: float = 0.0
    switch_coef: float = 0.0
    correct: bool = False
    capacity: float | None = None
    statistics: bool = False
    exchange: Literal["all_to_all", "ring"] | None = None

    def __post_init__(self) -> None:
        for name in ("z_coef", "switch_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected a number of at least 0")
        if self.capacity is not None and not 0 < self.capacity < math.inf:
            raise ValueError(f"capacity={self.capacity}; expected a number above 0, or None to drop nothing")
        if self.exchange not in ("all_to_all", "ring", None):
            raise ValueError(f"exchange={self.exchange!r}; expected 'all_to_all' or 'ring'")
        if self.exchange is not None and self.capacity is not None:
            raise ValueError(f"exchange={self.exchange!r} with capacity={self.capacity}; expected one of them")

    def rows(self, choices: int, experts: int) -> int | None:
        """Return the most rows of an expert, of so many choices of tokens."""
        return None if self.capacity is None else max(1, math.ceil(self.capacity * choices / experts))


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
        correction: scores are corrected for the choice only, by numbers that the loss has no gradient for.
        balance: coefficient of the balancing loss, which is 1 where all experts are used alike; 0 for none.
        training: what training adds.
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
    training: SparseTraining = SparseTraining()


class Router(nnx.Module):
    """Scores of experts, in float32 (float64 for float64) whatever the dtype of activations.

    Args:
        features: width of the residual stream.
        select: how tokens choose.
        init: of the weight.
        dtype: of the parameters; that of the correction is float32.
        rngs: where the initial weights come from.

    Raises:
        ValueError: the correction is to be trained, but there is none.
    """

    def __init__(self, features: int, select: Selection, *, init: Initializer, dtype: Any, rngs: nnx.Rngs) -> None:
        if select.training.correct and not select.correction:
            raise ValueError("correct=True, but these routers have no correction; balance them with a loss instead")
        zeros, count = nnx.initializers.zeros, select.experts
        self.weight = parameter(rngs, (features, count), ("embed", "experts"), init, dtype, 1)
        if select.bias:
            self.bias = parameter(rngs, (count,), ("experts",), zeros, dtype)
        if select.correction:
            self.correction = parameter(rngs, (count,), ("experts",), zeros, jnp.float32)
        self.select = select

    def logits(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens experts"]:
        """Return what each expert's score is made of."""
        logits = einsum("td,de->te", x.astype(exact(x)), self.weight.get_value())
        return logits + self.bias.get_value().astype(logits.dtype) if self.select.bias else logits

    def choose(self, logits: Float[Array, "tokens experts"], experts: Int[Array, "tokens k"] | None = None) -> Routing:
        """Return each token's experts and their weights; `experts` are those that tokens chose before."""
        select = self.select
        return route(
            logits,
            select.top_k,
            scoring=select.scoring,
            bias=self.correction.get_value() if select.correction else None,
            groups=select.groups,
            renormalize=select.renormalize,
            scale=select.scale,
            experts=experts,
        )

    def __call__(
        self, layer: LayerIndex, x: Float[Array, "tokens features"], mixer: Any
    ) -> tuple[jax.Array, Routing, Any]:
        """Return logits, each token's experts and their weights, and the mixer, which may know earlier choices."""
        logits = self.logits(x)
        routing = self.choose(logits)
        experts, mixer = mixer.choose(layer, routing.experts)
        return logits, routing if experts is routing.experts else self.choose(logits, experts), mixer
