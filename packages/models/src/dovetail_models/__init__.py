"""Model families as plain flax NNX modules on one injected-mixer contract."""

from dovetail_models.hf_config import config_from_hf, config_to_hf
from dovetail_models.hf_fields import ConfigError
from dovetail_models.huggingface import from_pretrained, llama_map, save_pretrained
from dovetail_models.llama import Llama, LlamaConfig
from dovetail_models.state import abstract, init, logical_axes, merge, placements, split

__all__ = [
    "ConfigError",
    "Llama",
    "LlamaConfig",
    "abstract",
    "config_from_hf",
    "config_to_hf",
    "from_pretrained",
    "init",
    "llama_map",
    "logical_axes",
    "merge",
    "placements",
    "save_pretrained",
    "split",
]
