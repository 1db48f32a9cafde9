"""``config.json`` of ``LlamaForCausalLM`` to and from `LlamaConfig`: every field is applied or refused."""

from collections.abc import Mapping
from typing import Any

from dovetail_models import hf_rope
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.llama import LlamaConfig

__all__ = ["config_from_hf", "config_to_hf"]

ARCHITECTURE = "LlamaForCausalLM"
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "features",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
OPTIONS: dict[str, tuple[str, type, Any]] = {
    "num_key_value_heads": ("kv_heads", int, None),
    "head_dim": ("head_dim", int, None),
    "max_position_embeddings": ("max_position", int, 2048),
    "rms_norm_eps": ("norm_eps", float, 1e-6),
    "tie_word_embeddings": ("tied", bool, False),
    "attention_bias": ("attention_bias", bool, False),
    "mlp_bias": ("mlp_bias", bool, False),
    "initializer_range": ("init_std", float, 0.02),
}
# What must have one value for our forward to be right.
FIXED = {"hidden_act": "silu", "pretraining_tp": 1, "attention_dropout": 0.0}
# What must have one value but is not written.
REFUSED = {"rope_interleaved": False, "partial_rotary_factor": 1.0, "add_cross_attention": False}
# What does not change the forward.
IGNORED = {
    *("architectures", "model_type", "torch_dtype", "dtype", "use_cache", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
    *("return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id", "num_labels"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "problem_type", "keys_to_ignore_at_inference"),
    *("finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "torchscript", "use_bfloat16"),
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty"),
    *("is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
}


def config_from_hf(values: Mapping[str, Any]) -> LlamaConfig:
    """Translate a parsed ``config.json`` (of transformers 4 or 5).

    Raises:
        ConfigError: another architecture, a missing or malformed field, or a field that this model cannot honour.

    >>> sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> config_from_hf({"architectures": ["LlamaForCausalLM"], **sizes, "num_attention_heads": 2}).dim
    4
    """
    _check_architecture(values)
    absent = [name for name in SIZES if name not in values]
    if absent:
        raise ConfigError(f"missing fields {absent}; they have no default")
    for name, only in (FIXED | REFUSED).items():
        if values.get(name) not in (None, only):
            raise ConfigError(f"{name}={values[name]!r}; only {only!r} is supported")
    known = {*SIZES, *OPTIONS, *FIXED, *REFUSED, *IGNORED, *hf_rope.FIELDS}
    unknown = sorted(str(name) for name in set(values) - known)
    if unknown:
        raise ConfigError(
            f"unknown fields {unknown}; they might change the model's numbers. Remove them if you know that they do not"
        )
    fields = {ours: field(values, name, int) for name, ours in SIZES.items()}
    fields |= {ours: field(values, name, kind, default) for name, (ours, kind, default) in OPTIONS.items()}
    theta, scaling = hf_rope.from_hf(values, fields["max_position"])
    try:
        return LlamaConfig(**fields, rope_theta=theta, rope_scaling=scaling)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_architecture(values: Mapping[str, Any]) -> None:
    named, kind = values.get("architectures"), values.get("model_type")
    if named is None and kind is None:
        raise ConfigError(f"neither architectures nor model_type; expected architectures=[{ARCHITECTURE!r}]")
    if named not in (None, [ARCHITECTURE]):
        raise ConfigError(f"architectures={named!r}; expected [{ARCHITECTURE!r}]")
    if kind not in (None, "llama"):
        raise ConfigError(f"model_type={kind!r}; expected 'llama'")


def config_to_hf(config: LlamaConfig, *, dtype: str, token_ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the ``config.json`` of a model, for transformers 4 and 5.

    Args:
        config: sizes and options.
        dtype: of the parameters, by name.
        token_ids: ``bos_token_id``, ``eos_token_id`` and the like.

    Raises:
        ConfigError: transformers has no such model, or `token_ids` holds something else.
    """
    if config.features % config.heads:
        raise ConfigError(
            f"features={config.features} is no multiple of heads={config.heads}; transformers refuses such a model"
        )
    others = [name for name in token_ids or {} if not name.endswith("_token_id")]
    if others:
        raise ConfigError(f"token_ids has {others}; expected names that end with '_token_id'")
    values: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": "llama", "torch_dtype": dtype}
    values |= {name: getattr(config, ours) for name, ours in SIZES.items()}
    values |= {name: getattr(config, ours) for name, (ours, _, _) in OPTIONS.items()}
    values |= {"num_key_value_heads": config.groups, "head_dim": config.dim} | FIXED
    return values | hf_rope.to_hf(config.rope_theta, config.rope_scaling) | dict(token_ids or {})
