"""The DeepSeek-V3 family: a V2 with sigmoid routing, a correction of it, and heads that look further ahead.

DeepSeek-V3 is arXiv:2412.19437; its checkpoints and those of R1 must be stored in bfloat16 first.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import ExpertGroups, einsum
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_rules import OURS, THEIRS
from dovetail_models.latent import OPTIONS, LatentConfig, latent_block, latent_fields, latent_rules
from dovetail_models.layers import parameter
from dovetail_models.moe import Selection
from dovetail_protocols import Auxiliary
from dovetail_weights import Rule, Transpose, WeightMap

__all__ = ["FAMILY", "Ahead", "DeepseekV3", "DeepseekV3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(LatentConfig):
    """Sizes and options of a DeepseekV3; see `LatentConfig` for the others.

    Attributes:
        renormalize: the weights of a token's experts sum to 1 before they are scaled.
        interleaved: neighbouring features are rotated, otherwise those of the two halves.
        ahead: how many heads look further ahead than the next token.
    """

    expert_groups: int | None = 8
    kept_groups: int | None = 4
    routed_scale: float = 2.5
    renormalize: bool = True
    interleaved: bool = True
    ahead: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_groups is None or self.experts // self.expert_groups < 2:
            raise ValueError(f"expert_groups={self.expert_groups}; expected groups of at least 2 of the experts")
        if self.ahead < 0:
            raise ValueError(f"ahead={self.ahead}; expected at least 0")

    @property
    def select(self) -> Selection:
        """See `LatentConfig.select`."""
        assert self.expert_groups is not None
        assert self.kept_groups is not None
        groups = ExpertGroups(self.expert_groups, self.kept_groups)
        return dataclasses.replace(
            super().select, scoring="sigmoid", renormalize=self.renormalize, groups=groups, correction=True
        )


class Ahead(nnx.Module):
    """A head that predicts one token further: a layer over the states so far and the tokens after them."""

    def __init__(self, config: DeepseekV3Config, index: int, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        weights = {"init": config.init, "out_init": config.out_init, "dtype": param_dtype, "rngs": rngs}
        self.embedding_norm, self.hidden_norm = config.norm(param_dtype), config.norm(param_dtype)
        shape, axes = (2 * config.features, config.features), (None, "embed")
        self.join = parameter(rngs, shape, axes, config.init, param_dtype, 1)
        self.block = DeepseekV3.block(config, config.layers + index, **weights)
        self.norm = config.norm(param_dtype)
        self.layer = config.layers + index

    def __call__(self, hidden: jax.Array, embedded: jax.Array, positions: jax.Array, mixer: Any) -> Any:
        """Return the states, their auxiliary values, and the mixer."""
        both = jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        rotary = self.block.attention.rotary
        x, aux, mixer = self.block(
            self.layer, einsum("td,df->tf", both, self.join.get_value()), {rotary: rotary.table(positions)}, mixer
        )
        return self.norm(x), aux, mixer


class DeepseekV3(Decoder):
    """A DeepSeek-V3; see `Decoder`. Its heads that look ahead take no part in `hidden`; see `look_ahead`."""

    config: DeepseekV3Config

    def __init__(
        self, config: DeepseekV3Config, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, **options: Any
    ) -> None:
        super().__init__(config, rngs=rngs, param_dtype=param_dtype, **options)
        if config.ahead:
            heads = [Ahead(config, i, param_dtype=param_dtype, rngs=rngs) for i in range(config.ahead)]
            self.ahead = nnx.List(heads)

    @staticmethod
    def block(config: DeepseekV3Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        return latent_block(config, index, interleaved=config.interleaved, **weights)

    def look_ahead(
        self,
        hidden: Float[Array, "tokens features"],
        following: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        mixer: Any,
        *,
        head: int = 0,
    ) -> tuple[Float[Array, "tokens features"], Auxiliary, Any]:
        """Return hidden states from which `unembed` predicts one token further than from `hidden`.

        The first head takes the states of `Decoder.hidden` and of each token the next one, which is the target of
        training, and predicts the one after that; the second takes what the first gave and the tokens after its own.
        The loss of head k counts where token k + 2 after a token is of the same sequence.

        Args:
            hidden: from `hidden`, or from the head before.
            following: the tokens that `hidden` predicts.
            positions: as for `hidden`.
            mixer: a dense one; the engine's caches have no room for these layers.
            head: which one.

        Raises:
            ValueError: the model has no such head.
        """
        if not 0 <= head < self.config.ahead:
            raise ValueError(f"head={head}; the model has {self.config.ahead} heads that look ahead")
        return self.ahead[head](hidden, self.embed(following), positions, mixer)


def _weight_map(config: DeepseekV3Config) -> WeightMap:
    rules = latent_rules(config)
    return WeightMap([*rules, *(rule for i in range(config.ahead) for rule in _ahead(config, rules, i))])


def _ahead(config: DeepseekV3Config, rules: list[Rule], index: int) -> list[Rule]:
    """Return the rules of a head, which stands among the layers there, after the last one."""
    ours, theirs = f"ahead/{index}", THEIRS.format(i=config.layers + index)
    names = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "norm": "shared_head.norm"}
    block = [
        dataclasses.replace(
            rule,
            addresses=tuple(a.replace(OURS, f"{ours}/block") for a in rule.addresses),
            names=tuple(name.replace(THEIRS, theirs) for name in rule.names),
        )
        for rule in rules
        if rule.addresses[0].startswith(OURS)
    ]
    norms = [Rule(f"{ours}/{name}/weight", f"{theirs}.{there}.weight") for name, there in names.items()]
    return [*block, *norms, Rule(f"{ours}/join", f"{theirs}.eh_proj.weight", (Transpose(),))]


def _held(config: DeepseekV3Config, names: Collection[str]) -> DeepseekV3Config:
    """Return a configuration of the heads that are there: transformers writes their number, but not their tensors."""
    found = {int(match[1]) for name in names if (match := re.fullmatch(r"model\.layers\.(\d+)\.eh_proj\.weight", name))}
    return dataclasses.replace(config, ahead=min(config.ahead, len(found)))


FAMILY = Family(
    DeepseekV3,
    ConfigMap(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        DeepseekV3Config,
        options={
            **OPTIONS,
            "max_position_embeddings": ("max_position", int, 4096),
            "moe_intermediate_size": ("expert_hidden", int, 2048),
            "n_routed_experts": ("experts", int, 256),
            "n_shared_experts": ("shared_experts", int, 1),
            "num_experts_per_tok": ("top_k", int, 8),
            "routed_scaling_factor": ("routed_scale", float, 2.5),
            "first_k_dense_replace": ("first_dense", int, 3),
            "n_group": ("expert_groups", int, 8),
            "topk_group": ("kept_groups", int, 4),
            "norm_topk_prob": ("renormalize", bool, True),
            "rope_interleave": ("interleaved", bool, True),
            "num_nextn_predict_layers": ("ahead", int, 1),
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={
            **{"pretraining_tp": 1, "moe_layer_freq": 1, "seq_aux": True},
            **{"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        },
        ignored=("head_dim", "qk_head_dim", "ep_size", "auto_map"),
        others=(latent_fields,),
    ),
    _weight_map,
    held=_held,
    ignored=("model.layers.*.embed_tokens.weight", "model.layers.*.shared_head.head.weight"),
)
