"""What the config maps and weight maps of encoders share."""

from collections.abc import Mapping
from typing import Any

from dovetail_models.hf_config import Fields
from dovetail_models.hf_fields import ConfigError, field
from dovetail_weights import Reshape, Rule, Transpose

__all__ = ["SIZES", "activation_field", "attention_rules", "linear_rules", "mlp_rules", "no_more_tokens", "norm_rules"]

SIZES = {
    "hidden_size": "features",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def activation_field(name: str, ours: str, default: str) -> Fields:
    """Return how an activation is read and written.

    Args:
        name: of the field.
        ours: of ours.
        default: theirs where it is absent.
    """

    def read(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
        found = field(values, name, str, default)
        if found not in ACTIVATIONS:
            raise ConfigError(f"{name}={found!r}; supported are {', '.join(ACTIVATIONS)}")
        return {ours: ACTIVATIONS[found]}

    def write(config: Any) -> Mapping[str, Any]:
        return {name: next(theirs for theirs, mine in ACTIVATIONS.items() if mine == getattr(config, ours))}

    return Fields((name,), read, write)


def linear_rules(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a linear layer with a bias."""
    return [Rule(f"{ours}/weight", f"{theirs}.weight", (Transpose(),)), Rule(f"{ours}/bias", f"{theirs}.bias")]


def norm_rules(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a norm; one without a bias never uses the second."""
    return [Rule(f"{ours}/{name}", f"{theirs}.{name}") for name in ("weight", "bias")]


def attention_rules(config: Any, ours: str, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    """Return the rules of an attention.

    Args:
        config: with `features`, `heads` and `dim`.
        ours: its address.
        theirs: what all of its names begin with.
        names: theirs of ``query``, ``key``, ``value`` and ``out``.
    """
    d, h, e = config.features, config.heads, config.dim
    out = f"{theirs}.{names['out']}"
    rules = [
        Rule(f"{ours}/out", f"{out}.weight", (Transpose(), Reshape((h * e, d), (h, e, d)))),
        Rule(f"{ours}/out_bias", f"{out}.bias"),
    ]
    for name in ("query", "key", "value"):
        full = f"{theirs}.{names[name]}"
        rules += [
            Rule(f"{ours}/{name}", f"{full}.weight", (Transpose(), Reshape((d, h * e), (d, h, e)))),
            Rule(f"{ours}/{name}_bias", f"{full}.bias", (Reshape((h * e,), (h, e)),)),
        ]
    return rules


def mlp_rules(ours: str, theirs: str, up: str, down: str) -> list[Rule]:
    """Return the rules of an `MLP`, whose two linear layers have the given names."""
    return [
        rule
        for name, their in (("up", up), ("down", down))
        for rule in (
            Rule(f"{ours}/{name}", f"{theirs}.{their}.weight", (Transpose(),)),
            Rule(f"{ours}/{name}_bias", f"{theirs}.{their}.bias"),
        )
    ]


def no_more_tokens(time: int, most: int) -> None:
    """Check the length of a row.

    Raises:
        ValueError: there are fewer positions than tokens.
    """
    if time > most:
        raise ValueError(f"rows of {time} tokens; the model has positions for {most}")
