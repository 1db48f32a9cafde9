"""Layers with experts of which some see every token, after some dense layers (DeepSeekMoE, arXiv:2401.06066)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dovetail_kernels import ExpertGroups
from dovetail_models.decoder import Block
from dovetail_models.hf_rules import OURS, THEIRS, expert_rules, mlp_rules
from dovetail_models.layers import GatedMLP
from dovetail_models.moe import SparseConfig, sparse_mlp
from dovetail_models.router import Selection
from dovetail_weights import Rule

__all__ = ["CorrectedConfig", "SharedExpertsConfig", "shared_block", "shared_rules"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig(SparseConfig):
    """Experts of which some see every token; see `SparseConfig` for the others. `hidden` is the width of dense MLPs.

    Attributes:
        expert_hidden: width of each expert.
        shared_experts: how many experts every token goes to.
        first_dense: so many layers have a dense MLP, the others experts.
        routed_scale: factor of the weights of the chosen experts.
        expert_groups: how many groups the experts are in.
        kept_groups: how many of them a token chooses first.
    """

    expert_hidden: int
    shared_experts: int
    first_dense: int
    routed_scale: float = 1.0
    expert_groups: int | None = None
    kept_groups: int | None = None

    def __post_init__(self) -> None:
        for name in ("expert_hidden", "shared_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        super().__post_init__()
        if self.first_dense < 0:
            raise ValueError(f"first_dense={self.first_dense}; expected at least 0")
        _check_groups(self)

    def rearranged(self, order: Sequence[int]) -> dict[str, Any]:
        """See `StackConfig.rearranged`; no field can say that a dense layer comes after one with experts."""
        return {**super().rearranged(order), "first_dense": sum(i < self.first_dense for i in order)}

    @property
    def select(self) -> Selection:
        """See `SparseConfig.select`; the coefficient is that of alike used experts."""
        balance = self.balance_coef if self.balanced else 0.0
        return dataclasses.replace(super().select, scale=self.routed_scale, balance=balance)


def _check_groups(config: SharedExpertsConfig) -> None:
    count, kept = config.expert_groups, config.kept_groups
    if count is None and kept is None:
        return
    if count is None or kept is None or not 0 < kept <= count or config.experts % count:
        raise ValueError(
            f"expert_groups={count}, kept_groups={kept}; expected a divisor of {config.experts} experts, and 1 to that"
        )
    if config.top_k > kept * (config.experts // count):
        raise ValueError(f"top_k={config.top_k}; expected at most the experts of {kept} groups")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectedConfig(SharedExpertsConfig):
    """Experts that are chosen by sigmoids with a correction, in groups; see `SharedExpertsConfig` for the others.

    Attributes:
        renormalize: the weights of a token's experts sum to 1 before they are scaled.
    """

    renormalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_groups is None or self.experts // self.expert_groups < 2:
            raise ValueError(f"expert_groups={self.expert_groups}; expected groups of at least 2 of the experts")

    @property
    def select(self) -> Selection:
        """See `SharedExpertsConfig.select`."""
        assert self.expert_groups is not None
        assert self.kept_groups is not None
        groups = ExpertGroups(self.expert_groups, self.kept_groups)
        return dataclasses.replace(
            super().select, scoring="sigmoid", renormalize=self.renormalize, groups=groups, correction=True
        )


def shared_block(
    config: SharedExpertsConfig, index: int, attention: Any, *, mlp_bias: bool = False, **weights: Any
) -> Block:
    """Return a layer with a dense MLP, or with experts.

    Args:
        config: sizes and options.
        index: of the layer.
        attention: of the layer.
        mlp_bias: biases of dense MLPs, the shared one included.
        weights: see `Decoder.block`.
    """

    def dense(hidden: int) -> GatedMLP:
        return GatedMLP(config.features, hidden, bias=mlp_bias, **weights)

    if index < config.first_dense:
        return Block(config, attention, dense(config.hidden), dtype=weights["dtype"])
    shared = dense(config.expert_hidden * config.shared_experts)
    mlp = sparse_mlp(config, config.expert_hidden, shared=shared, **weights)
    return Block(config, attention, mlp, dtype=weights["dtype"])


def shared_rules(config: SharedExpertsConfig) -> list[Rule]:
    """Return the rules of the router and the experts."""
    ours, theirs = f"{OURS}/mlp", f"{THEIRS}.mlp"
    return [
        *expert_rules(config.experts),
        *mlp_rules(f"{ours}/shared", f"{theirs}.shared_experts"),
        Rule(f"{ours}/router/correction", f"{theirs}.gate.e_score_correction_bias"),
    ]
