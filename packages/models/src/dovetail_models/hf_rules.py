"""Rules that the weight maps of several families share.

Linear layers are ``[out, in]`` there and ``[in, out]`` here, with the heads as an axis of their own. Both use the half
layout of rotary embeddings, so nothing is permuted. A rule for what a configuration does not have is never used.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from dovetail_weights import Reshape, Rule, Stack, Transpose

__all__ = ["OURS", "THEIRS", "attention_rules", "decoder_rules", "expert_rules", "mlp_rules", "outer_rules"]

OURS, THEIRS = "layers/{i}", "model.layers.{i}"


NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def decoder_rules(
    config: Any, *, norm: Literal["head", "all"] = "head", norms: Mapping[str, str] = MappingProxyType(NORMS)
) -> list[Rule]:
    """Return the rules of embedding, norms, attention, gated MLP and head, as most decoders name them.

    Args:
        config: sizes and options.
        norm: see `attention_rules`.
        norms: see `outer_rules`.
    """
    return [*outer_rules(norms), *attention_rules(config, norm=norm), *mlp_rules()]


def outer_rules(norms: Mapping[str, str] = MappingProxyType(NORMS)) -> list[Rule]:
    """Return the rules of embedding, norms and head alone.

    Args:
        norms: their names for those of a `Block`.
    """
    named = {"norm": "model.norm"} | {f"{OURS}/{ours}": f"{THEIRS}.{theirs}" for ours, theirs in norms.items()}
    return [
        Rule("embedding", "model.embed_tokens.weight"),
        Rule("head", "lm_head.weight", (Transpose(),)),
        *(Rule(f"{ours}/{part}", f"{theirs}.{part}") for ours, theirs in named.items() for part in ("weight", "bias")),
    ]


def attention_rules(config: Any, *, norm: Literal["head", "all"] = "head") -> list[Rule]:
    """Return the rules of a `GroupedAttention`.

    Args:
        config: sizes and options.
        norm: of queries and keys, see `GroupedAttention`.
    """
    d, e, h = config.features, config.dim, config.heads
    ours, theirs = f"{OURS}/attention", f"{THEIRS}.self_attn"
    rules = [
        Rule(f"{ours}/out", f"{theirs}.o_proj.weight", (Transpose(), Reshape((h * e, d), (h, e, d)))),
        Rule(f"{ours}/out_bias", f"{theirs}.o_proj.bias"),
        Rule(f"{ours}/sinks", f"{theirs}.sinks"),
    ]
    for name, short, heads in (("query", "q", h), ("key", "k", config.groups), ("value", "v", config.groups)):
        split, flat = Reshape((d, heads * e), (d, heads, e)), Reshape((heads * e,), (heads, e))
        rules += [
            Rule(f"{ours}/{name}", f"{theirs}.{short}_proj.weight", (Transpose(), split)),
            Rule(f"{ours}/{name}_bias", f"{theirs}.{short}_proj.bias", (flat,)),
            Rule(f"{ours}/{name}_norm/weight", f"{theirs}.{short}_norm.weight", (flat,) if norm == "all" else ()),
        ]
    return rules


def mlp_rules(ours: str = f"{OURS}/mlp", theirs: str = f"{THEIRS}.mlp") -> list[Rule]:
    """Return the rules of a gated MLP."""
    names = ("gate", "up", "down")
    weights = [Rule(f"{ours}/{name}", f"{theirs}.{name}_proj.weight", (Transpose(),)) for name in names]
    return weights + [Rule(f"{ours}/{name}_bias", f"{theirs}.{name}_proj.bias") for name in names]


PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def expert_rules(
    experts: int, *, theirs: str = f"{THEIRS}.mlp", names: Mapping[str, str] = MappingProxyType(PROJECTIONS)
) -> list[Rule]:
    """Return the rules of the router and of experts that are stored one by one.

    Args:
        experts: how many.
        theirs: the module that holds them.
        names: their names for the products of an expert.
    """
    ours = f"{OURS}/mlp"
    weights = [
        Rule(
            f"{ours}/experts/{name}",
            f"{theirs}.experts.{{e}}.{name_there}.weight",
            (Transpose(), Stack(experts)),
            over={"e": experts},
        )
        for name, name_there in names.items()
    ]
    return [Rule(f"{ours}/router/weight", f"{theirs}.gate.weight", (Transpose(),)), *weights]
