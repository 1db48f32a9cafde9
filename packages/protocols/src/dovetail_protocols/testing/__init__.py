"""Conformance kits: each checks an implementation of one contract and says which rule it breaks, with the values.

Not imported by `dovetail_protocols` itself; import it in tests. A kit that finds nothing returns None.
"""

from dovetail_protocols.testing._rules import ConformanceError
from dovetail_protocols.testing.checkpoint import check_checkpointer
from dovetail_protocols.testing.data import check_host_split, check_loader, check_loader_follows_plan, check_plan
from dovetail_protocols.testing.engine import check_engine
from dovetail_protocols.testing.fake_engine import FakeEngine
from dovetail_protocols.testing.loss import check_loss
from dovetail_protocols.testing.low_rank import check_low_rank
from dovetail_protocols.testing.mixer import MixerCase, check_mixer
from dovetail_protocols.testing.model import check_language_model
from dovetail_protocols.testing.quantized import FakeQuantized, check_quantized
from dovetail_protocols.testing.recurrence import check_recurrence
from dovetail_protocols.testing.reference import ReferenceMixer, attention
from dovetail_protocols.testing.servable import check_servable
from dovetail_protocols.testing.sink import check_sink
from dovetail_protocols.testing.tokenizer import check_tokenizer

__all__ = [
    "ConformanceError",
    "FakeEngine",
    "FakeQuantized",
    "MixerCase",
    "ReferenceMixer",
    "attention",
    "check_checkpointer",
    "check_engine",
    "check_host_split",
    "check_language_model",
    "check_loader",
    "check_loader_follows_plan",
    "check_loss",
    "check_low_rank",
    "check_mixer",
    "check_plan",
    "check_quantized",
    "check_recurrence",
    "check_servable",
    "check_sink",
    "check_tokenizer",
]
