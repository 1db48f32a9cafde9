"""Model families as plain flax NNX modules on one injected-mixer contract."""

from dovetail_models.llama import Llama, LlamaConfig
from dovetail_models.state import abstract, logical_axes, merge, split

__all__ = ["Llama", "LlamaConfig", "abstract", "logical_axes", "merge", "split"]
