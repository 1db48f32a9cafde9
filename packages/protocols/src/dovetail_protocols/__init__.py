"""The contracts that Dovetail's packages meet: plain pytrees and callables, no base class to inherit.

What needs jax is imported on first use, so that a command line or a data worker starts without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dovetail_protocols import paths
from dovetail_protocols.batch import LMBatch, batch_size, pad_choices, split_rows
from dovetail_protocols.checkpointer import Checkpointer, Restored
from dovetail_protocols.command import Command, CommandError
from dovetail_protocols.engine import (
    Completion,
    Delta,
    Engine,
    FinishReason,
    Request,
    SamplingParams,
    Stream,
    TokenLogprob,
)
from dovetail_protocols.loader import Loader, Plan
from dovetail_protocols.loss import Loss, LossOutput, Term
from dovetail_protocols.metrics import Sink
from dovetail_protocols.servable import Servable, TensorSpec
from dovetail_protocols.tokenizer import ChatEncoding, IncrementalDecoder, Message, RoleSpan, Tokenizer

if TYPE_CHECKING:
    from dovetail_protocols.low_rank import LowRankArray
    from dovetail_protocols.model import (
        Auxiliary,
        CacheSpec,
        FullCache,
        LanguageModel,
        LatentCache,
        LayerIndex,
        Mixer,
        Recurrence,
        RecurrentCache,
        WindowCache,
        add_auxiliary,
    )
    from dovetail_protocols.quantized import QuantizedArray
    from dovetail_protocols.weight import Weight, as_array

__all__ = [
    "Auxiliary",
    "CacheSpec",
    "ChatEncoding",
    "Checkpointer",
    "Command",
    "CommandError",
    "Completion",
    "Delta",
    "Engine",
    "FinishReason",
    "FullCache",
    "IncrementalDecoder",
    "LMBatch",
    "LanguageModel",
    "LatentCache",
    "LayerIndex",
    "Loader",
    "Loss",
    "LossOutput",
    "LowRankArray",
    "Message",
    "Mixer",
    "Plan",
    "QuantizedArray",
    "Recurrence",
    "RecurrentCache",
    "Request",
    "Restored",
    "RoleSpan",
    "SamplingParams",
    "Servable",
    "Sink",
    "Stream",
    "TensorSpec",
    "Term",
    "TokenLogprob",
    "Tokenizer",
    "Weight",
    "WindowCache",
    "add_auxiliary",
    "as_array",
    "batch_size",
    "pad_choices",
    "paths",
    "split_rows",
]

LATE = {"LowRankArray": "low_rank", "QuantizedArray": "quantized", "Weight": "weight", "as_array": "weight"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dovetail_protocols' has no attribute {name!r}")
    module = LATE.get(name, "model")
    return getattr(importlib.import_module(f"dovetail_protocols.{module}"), name)
