"""Heads that look further ahead than the next token (DeepSeek-V3, arXiv:2412.19437, 2.2)."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import einsum
from dovetail_models.decoder import Decoder, DecoderConfig
from dovetail_models.hf_rules import OURS, THEIRS
from dovetail_models.layers import parameter
from dovetail_protocols import Auxiliary, LayerIndex
from dovetail_weights import Rule, Transpose

__all__ = ["REPEATED", "Ahead", "AheadConfig", "AheadDecoder", "held_heads", "with_heads"]

REPEATED = ("model.layers.*.embed_tokens.weight", "model.layers.*.shared_head.head.weight")
"""Tensors of heads that repeat those of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AheadConfig(DecoderConfig):
    """Heads that look further ahead.

    Attributes:
        ahead: how many heads look further ahead than the next token.
    """

    ahead: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead < 0:
            raise ValueError(f"ahead={self.ahead}; expected at least 0")


class Ahead(nnx.Module):
    """A head that predicts one token further: a layer over the states so far and the tokens after them.

    Args:
        config: sizes and options.
        layer: the index of its layer.
        block: its layer.
        param_dtype: dtype of the parameters.
        rngs: where the initial weights come from.
    """

    def __init__(self, config: AheadConfig, layer: LayerIndex, block: Any, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.embedding_norm, self.hidden_norm = config.norm(param_dtype), config.norm(param_dtype)
        shape, axes = (2 * config.features, config.features), (None, "embed")
        self.join = parameter(rngs, shape, axes, config.init, param_dtype, 1)
        self.block = block
        self.norm = config.norm(param_dtype)
        self.layer = layer

    def __call__(self, hidden: jax.Array, embedded: jax.Array, positions: jax.Array, mixer: Any) -> Any:
        """Return the states, their auxiliary values, and the mixer."""
        both = jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        rotary = self.block.attention.rotary
        x, aux, mixer = self.block(
            self.layer, einsum("td,df->tf", both, self.join.get_value()), {rotary: rotary.table(positions)}, mixer
        )
        return self.norm(x), aux, mixer


class AheadDecoder(Decoder):
    """A decoder with heads that look further ahead, which take no part in `hidden`; see `look_ahead` and `Decoder`."""

    def __init__(self, config: AheadConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, **options: Any) -> None:
        super().__init__(config, rngs=rngs, param_dtype=param_dtype, **options)
        if config.ahead:
            weights = {"init": config.init, "out_init": config.out_init, "dtype": param_dtype, "rngs": rngs}
            indices = range(config.layers, config.layers + config.ahead)
            blocks = {i: self.block(config, i, **weights) for i in indices}
            heads = [Ahead(config, i, block, param_dtype=param_dtype, rngs=rngs) for i, block in blocks.items()]
            self.ahead = nnx.List(heads)

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


def with_heads(config: AheadConfig, rules: list[Rule]) -> list[Rule]:
    """Return the rules of a decoder and those of its heads, which stand among the layers there, after the last one."""
    return [*rules, *(rule for i in range(config.ahead) for rule in _head_rules(config, rules, i))]


def _head_rules(config: AheadConfig, rules: list[Rule], index: int) -> list[Rule]:
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


Config = TypeVar("Config", bound=AheadConfig)


def held_heads(config: Config, names: Collection[str]) -> Config:
    """Return a configuration of the heads that are there: transformers writes their number, but not their tensors."""
    found = {int(match[1]) for name in names if (match := re.fullmatch(r"model\.layers\.(\d+)\.eh_proj\.weight", name))}
    return dataclasses.replace(config, ahead=min(config.ahead, len(found)))
