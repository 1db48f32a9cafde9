"""``config.json`` of ``LlamaForCausalLM`` to and from `LlamaConfig`: every field is applied or refused."""

from collections.abc import Mapping
from typing import Any

from dovetail_kernels import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from dovetail_models.llama import LlamaConfig

__all__ = ["ConfigError", "config_from_hf", "config_to_hf"]

ARCHITECTURE = "LlamaForCausalLM"
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "features",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
OPTIONS: dict[str, tuple[str, Any]] = {
    "num_key_value_heads": ("kv_heads", None),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_position", 2048),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tied", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "initializer_range": ("init_std", 0.02),
}
# What must have one value for our forward to be right.
FIXED = {"hidden_act": "silu", "pretraining_tp": 1, "attention_dropout": 0.0}
# What does not change the forward.
IGNORED = {
    *("architectures", "model_type", "torch_dtype", "dtype", "use_cache", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
    *("return_dict", "output_hidden_states", "output_attentions", "_attn_implementation", "id2label", "label2id"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "add_cross_attention", "problem_type"),
    *("finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "torchscript", "use_bfloat16"),
}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


class ConfigError(ValueError):
    """A ``config.json`` does not describe a model that this package builds."""


def config_from_hf(values: Mapping[str, Any]) -> LlamaConfig:
    """Translate a parsed ``config.json`` (of transformers 4 or 5).

    Raises:
        ConfigError: another architecture, a missing or malformed field, or a field that this model cannot honour.
    """
    named = values.get("architectures") or [values.get("model_type")]
    if named not in ([ARCHITECTURE], ["llama"]):
        raise ConfigError(f"architectures={named}; expected [{ARCHITECTURE!r}]")
    absent = [name for name in SIZES if name not in values]
    if absent:
        raise ConfigError(f"missing fields {absent}; they have no default")
    for name, only in FIXED.items():
        if values.get(name, only) != only:
            raise ConfigError(f"{name}={values[name]!r}; only {only!r} is supported")
    unknown = sorted(set(values) - set(SIZES) - set(OPTIONS) - set(FIXED) - IGNORED - set(ROPE))
    if unknown:
        raise ConfigError(f"unknown fields {unknown}; they might change the model's numbers, so it is not loaded")
    fields = {ours: _number(values, name, int) for name, ours in SIZES.items()}
    options = {ours: _option(values, name, default) for name, (ours, default) in OPTIONS.items()}
    theta, scaling = _rope(values)
    try:
        return LlamaConfig(**fields, **options, rope_theta=theta, rope_scaling=scaling)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _option(values: Mapping[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    if value is None:
        return default
    return _number(values, name, type(default) if default is not None else int)


def _number(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}={value!r}; expected {'an' if kind is int else 'a'} {kind.__name__}")
    return value


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    found = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"rope_parameters={found!r}; expected a mapping")
    given = {**found}
    theta = given.pop("rope_theta", values.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float):
        raise ConfigError(f"rope_theta={theta!r}; expected a number")
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    limit = values.get("max_position_embeddings", 2048)
    try:
        scaling = _scaling(kind, given, limit)
    except KeyError as error:
        raise ConfigError(f"rope of type {kind!r} lacks {error.args[0]!r}; it has {sorted(given)}") from error
    if given:
        raise ConfigError(f"rope of type {kind!r} has fields {sorted(given)} that are not supported")
    return float(theta), scaling


def _scaling(kind: str, given: dict[str, Any], limit: int) -> RopeScaling | None:
    """Take the fields of a scaling out of `given`."""
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(given.pop("factor"))
        case "llama3":
            return Llama3Scaling(
                given.pop("factor"),
                given.pop("low_freq_factor"),
                given.pop("high_freq_factor"),
                given.pop("original_max_position_embeddings", limit),
            )
        case "yarn":
            return _yarn(given, limit)
        case _:
            raise ConfigError(f"rope type {kind!r}; supported are 'default', 'linear', 'llama3' and 'yarn'")


def _yarn(given: dict[str, Any], limit: int) -> YarnScaling:
    original = given.pop("original_max_position_embeddings", None)
    factor = given.pop("factor", None)
    if factor is None and original is None:
        raise KeyError("factor")

    def option(name: str, default: Any) -> Any:
        value = given.pop(name, None)
        return default if value is None else value

    return YarnScaling(
        limit / original if factor is None else factor,
        limit if original is None else original,
        beta_fast=option("beta_fast", 32.0),
        beta_slow=option("beta_slow", 1.0),
        attention_factor=option("attention_factor", None),
        truncate=option("truncate", True),
    )


def config_to_hf(config: LlamaConfig, *, dtype: str, token_ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the ``config.json`` of a model.

    Args:
        config: sizes and options.
        dtype: of the parameters, by name.
        token_ids: ``bos_token_id``, ``eos_token_id`` and the like.
    """
    values: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": "llama", "torch_dtype": dtype}
    values |= {name: getattr(config, ours) for name, ours in SIZES.items()}
    values |= {name: getattr(config, ours) for name, (ours, _) in OPTIONS.items()}
    values |= {"num_key_value_heads": config.groups, "head_dim": config.dim} | FIXED
    rope = _rope_to_hf(config.rope_scaling)
    values |= {"rope_theta": config.rope_theta, "rope_scaling": rope}
    values["rope_parameters"] = {"rope_theta": config.rope_theta, **(rope or {"rope_type": "default"})}
    return values | dict(token_ids or {})


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
        case YarnScaling():
            values = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_position,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
            return (
                values if scaling.attention_factor is None else values | {"attention_factor": scaling.attention_factor}
            )
