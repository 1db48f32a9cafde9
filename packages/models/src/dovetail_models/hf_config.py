"""``config.json`` of one architecture to and from our configuration: every field is applied or refused."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dovetail_kernels import RopeScaling
from dovetail_models import hf_rope
from dovetail_models.hf_fields import ConfigError, field

__all__ = ["ConfigMap", "Fields"]

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "features",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
# What does not change the forward.
IGNORED = {
    *("architectures", "model_type", "torch_dtype", "dtype", "use_cache", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
    *("return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id", "num_labels"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "problem_type", "keys_to_ignore_at_inference"),
    *("finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "torchscript", "use_bfloat16"),
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version"),
}


class Fields(NamedTuple):
    """Fields of ``config.json`` that become ours by more than a new name.

    Attributes:
        names: of the fields.
        read: ``read(values, fields)`` returns ours; `fields` are those that were read before, under our names.
        write: returns the fields of a configuration.
    """

    names: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[Any], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ConfigMap:
    """How a configuration and the ``config.json`` of one architecture become each other.

    Attributes:
        architecture: such as ``LlamaForCausalLM``.
        model_type: such as ``llama``.
        config: makes our configuration of its fields.
        options: fields with a default, as ``{theirs: (ours, type, theirs by default)}``.
        aliases: other names of fields, as ``{other: name}``; read, never written.
        sizes: fields without a default, as ``{theirs: ours}``.
        attends: it has grouped attention with rotary embeddings, whose fields are read and written.
        rotary_fraction: which share of a head's features they turn, where none is given; None where always all.
        fixed: what must have one value for our forward to be right, and is written.
        refused: what must have one value, but is not written.
        ignored: what does not change the forward, besides what no architecture's forward depends on.
        divides: transformers refuses features that are no multiple of the heads.
        others: fields that become ours by more than a new name.
        rope_theta: base of the wavelengths where none is given.
        rope_scaling: how a longer context is reached where nothing about it is given.
        wholes: architectures of which this one is a part: their ``config.json`` describes it too.
        local_theta: where layers with a window have a base of their own, the field that holds it in transformers 4, and
            the base where none is given.
    """

    architecture: str
    model_type: str
    config: Callable[..., Any]
    options: Mapping[str, tuple[str, type, Any]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    sizes: Mapping[str, str] = dataclasses.field(default_factory=lambda: SIZES)
    attends: bool = True
    rotary_fraction: float | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    ignored: tuple[str, ...] = ()
    divides: bool = False
    others: tuple[Fields, ...] = ()
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    wholes: tuple[str, ...] = ()
    local_theta: tuple[str, float] | None = None

    def read(self, values: Mapping[str, Any]) -> Any:
        """Return our configuration of a parsed ``config.json`` (of transformers 4 or 5).

        Raises:
            ConfigError: another architecture, a missing or malformed field, or a field that this model cannot honour.
        """
        self._check_architecture(values)
        if quantized := values.get("quantization_config"):
            raise ConfigError(
                f"quantization_config={quantized!r}; quantized checkpoints are not read. Store the model in bfloat16 "
                "(`dequantize` of transformers) and leave the field out"
            )
        values = self._renamed(values)
        absent = [name for name in self.sizes if name not in values]
        if absent:
            raise ConfigError(f"missing fields {absent}; they have no default")
        for name, only in {**self.fixed, **self.refused}.items():
            if values.get(name) not in (None, only):
                raise ConfigError(f"{name}={values[name]!r}; only {only!r} is supported")
        known = {*self.sizes, *self.options, *self.fixed, *self.refused, *self.ignored, *IGNORED}
        known |= {name for others in self.others for name in others.names}
        known |= set(() if self.rotary_fraction is None else (hf_rope.SHARE,))
        known |= {*(hf_rope.FIELDS if self.attends else ()), *(self.local_theta or ())[:1]}
        unknown = sorted(str(name) for name in set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown fields {unknown}; they might change the model's numbers. Remove them if you know that they "
                "do not"
            )
        fields: dict[str, Any] = {ours: field(values, name, int) for name, ours in self.sizes.items()}
        fields |= {ours: field(values, name, kind, default) for name, (ours, kind, default) in self.options.items()}
        for others in self.others:
            fields |= others.read(values, fields)
        if self.attends:
            fields |= self.read_rope(values, fields["max_position"])
        if self.rotary_fraction is not None:
            fields["rotary_fraction"] = hf_rope.share(values, self.rotary_fraction)
        try:
            return self.config(**fields)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def read_rope(self, values: Mapping[str, Any], max_position: int) -> dict[str, Any]:
        """Return our rotary settings of a parsed ``config.json``; for errors see `read`."""
        local: dict[str, Any] = {}
        if self.local_theta is not None:
            values, local["local_theta"] = hf_rope.local_from_hf(values, max_position, *self.local_theta)
        theta, scaling = hf_rope.from_hf(
            values, max_position, self.rope_theta, partial=self.rotary_fraction is not None
        )
        if not any(values.get(name) for name in hf_rope.FIELDS[1:]):
            scaling = self.rope_scaling
        return {"rope_theta": theta, "rope_scaling": scaling, **local}

    def _renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in values.items() if name not in self.aliases}
        for other, name in self.aliases.items():
            given = values.get(other)
            if given is None:
                continue
            if found.get(name) is None:
                found[name] = given
            elif found[name] != given:
                raise ConfigError(f"{other}={given!r}, {name}={found[name]!r}; expected one value, of either name")
        return found

    def _check_architecture(self, values: Mapping[str, Any]) -> None:
        named, kind = values.get("architectures"), values.get("model_type")
        if named is None and kind is None:
            raise ConfigError(f"neither architectures nor model_type; expected architectures=[{self.architecture!r}]")
        if named not in (None, [self.architecture], *([whole] for whole in self.wholes)):
            raise ConfigError(f"architectures={named!r}; expected [{self.architecture!r}]")
        if kind not in (None, self.model_type):
            raise ConfigError(f"model_type={kind!r}; expected {self.model_type!r}")

    def write(self, config: Any, *, dtype: str, token_ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the ``config.json`` of a model, for transformers 4 and 5.

        Args:
            config: sizes and options.
            dtype: of the parameters, by name.
            token_ids: ``bos_token_id``, ``eos_token_id`` and the like.

        Raises:
            ConfigError: transformers has no such model, or `token_ids` holds something else.
        """
        others = [name for name in token_ids or {} if not name.endswith("_token_id")]
        if others:
            raise ConfigError(f"token_ids has {others}; expected names that end with '_token_id'")
        values: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        values |= {"torch_dtype": dtype} | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        values |= {name: getattr(config, ours) for name, ours in self.sizes.items()}
        values |= {name: getattr(config, ours) for name, (ours, _, _) in self.options.items()}
        values |= dict(self.fixed) | (self._attention(config) if self.attends else {})
        if values.get("head_dim", 0) is None:
            del values["head_dim"]  # it is the same there
        for fields in self.others:
            values |= fields.write(config)
        return values | dict(token_ids or {})

    def write_rope(self, config: Any) -> dict[str, Any]:
        """Return the rotary settings of ``config.json``."""
        rope = hf_rope.to_hf(config.rope_theta, config.rope_scaling)
        if self.local_theta is None:
            return rope
        return hf_rope.local_to_hf(rope, self.local_theta[0], config.local_theta)

    def _attention(self, config: Any) -> dict[str, Any]:
        if self.divides and config.features % config.heads:
            raise ConfigError(
                f"features={config.features} is no multiple of heads={config.heads}; transformers refuses such a model"
            )
        fields: dict[str, Any] = {"num_key_value_heads": config.groups, **self.write_rope(config)}
        if "head_dim" in self.options and (config.head_dim is not None or self.options["head_dim"][2] is not None):
            fields["head_dim"] = config.dim
        if self.rotary_fraction is not None:
            fields[hf_rope.SHARE] = fields["rope_parameters"][hf_rope.SHARE] = config.rotary_fraction
        return fields
