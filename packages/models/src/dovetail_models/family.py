"""Family: a kind of model, and how Hugging Face writes it; `FAMILIES` names those of this package."""

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_fields import ConfigError
from dovetail_models.stack import layer_map
from dovetail_weights import WeightMap

__all__ = ["FAMILIES", "Family", "architecture_family", "family_of", "named_family"]

FAMILIES = {
    "BertForMaskedLM": "bert:MASKED_LM",
    "BertModel": "bert",
    "LlamaForCausalLM": "llama",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "hf_gemma3",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GPT2LMHeadModel": "gpt2",
    "GptOssForCausalLM": "gpt_oss",
    "Mamba2ForCausalLM": "mamba2",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "SiglipModel": "hf_siglip",
    "SiglipTextModel": "hf_siglip:TEXT",
    "SiglipVisionModel": "hf_siglip:VISION",
    "SmolLM3ForCausalLM": "smollm3",
    "T5EncoderModel": "t5_encoder",
    "ViTForImageClassification": "vit:CLASSIFIER",
    "ViTModel": "vit",
}
"""The module of each architecture, which defines ``FAMILY``; another name follows a colon."""

SPARSE = "Sparse"
"""Before the name of an architecture: with experts in place of its MLPs, see `dovetail_models.sparse_family`."""


Spelling = tuple[tuple[str, str], ...]
"""Templates of names and what checkpoints have in their place, see `dovetail_weights.WeightMap.spelled`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        model: ``model(config, *, rngs, param_dtype, dtype)``.
        config_map: its configuration and ``config.json``.
        weight_map: of a configuration: its parameters and the checkpoint's tensors.
        ignored: tensors that checkpoints may have and the model does not need, as globs.
        spellings: other ways in which checkpoints spell the tensors' names; the one of which most is there is read, and
            none of it may be missing.
        held: of a configuration and the names of a checkpoint's tensors: the configuration of what is there, where
            checkpoints may leave out parts of the model.
        stacks: of a configuration: addresses of lists of layers that may be a `Stack`, and how many each has.
    """

    model: Callable[..., Any]
    config_map: ConfigMap
    weight_map: Callable[[Any], WeightMap]
    ignored: tuple[str, ...] = ()
    spellings: tuple[Spelling, ...] = ()
    held: Callable[[Any, Collection[str]], Any] = lambda config, _: config
    stacks: Callable[[Any], Mapping[str, int]] = lambda config: {"layers": config.layers}

    def table(self, config: Any) -> WeightMap:
        """Return the weight map, which knows the parameters of stacked layers, too."""
        return layer_map(self.weight_map(config), self.stacks(config))


def named_family(values: Mapping[str, Any]) -> Family:
    """Return the family that a parsed ``config.json`` names.

    Raises:
        ConfigError: none, or one that this package does not have.
    """
    named, kind = values.get("architectures"), values.get("model_type")
    if named is None and kind is None:
        raise ConfigError(f"neither architectures nor model_type; expected architectures=[one of {list(FAMILIES)}]")
    if named is not None:
        if not isinstance(named, list) or len(named) != 1 or str(named[0]).removeprefix(SPARSE) not in FAMILIES:
            parts = [name for name in FAMILIES if named in _wholes(architecture_family(name))]
            more = f", or family= one of {parts}, which such a checkpoint holds" if parts else ""
            raise ConfigError(f"architectures={named!r}; expected one of {list(FAMILIES)}{more}")
        return architecture_family(named[0])
    families = [architecture_family(name) for name in sorted(FAMILIES)]  # the bare model last
    kinds = {family.config_map.model_type: family for family in families}
    if kind not in kinds:
        raise ConfigError(f"model_type={kind!r}; expected one of {list(kinds)}")
    return kinds[kind]


def _wholes(family: Family) -> list[list[str]]:
    return [[whole] for whole in family.config_map.wholes]


def family_of(x: Any) -> Family:
    """Return the family of one of this package's models or configurations.

    Raises:
        TypeError: it is of none of them.
    """
    kind = type(x)
    if isinstance(dense := getattr(kind, "sparse_of", None), str):
        return architecture_family(SPARSE + dense)
    for architecture in FAMILIES if kind.__module__.startswith(f"{__package__}.") else ():
        family = architecture_family(architecture)
        if kind in (family.model, family.config_map.config):
            return family
    raise TypeError(
        f"{kind.__qualname__} of {kind.__module__} is of no family of {__package__}; pass family=, to lazy before a "
        "surgery"
    )


def architecture_family(architecture: str) -> Family:
    """Return the family of one of the `FAMILIES`.

    Raises:
        ConfigError: there is no such one.
    """
    if architecture.startswith(SPARSE) and architecture.removeprefix(SPARSE) in FAMILIES:
        made = importlib.import_module(f"{__package__}.sparse_family")  # which imports this module
        return made.sparse_family(architecture.removeprefix(SPARSE))
    if architecture not in FAMILIES:
        raise ConfigError(f"family={architecture!r}; expected one of {list(FAMILIES)}")
    module, _, name = FAMILIES[architecture].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name or "FAMILY")
