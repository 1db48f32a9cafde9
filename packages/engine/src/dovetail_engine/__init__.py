"""The inference engine: continuous batching over a paged cache, through the model's one forward."""

from dovetail_engine.engine import Engine
from dovetail_engine.options import EngineOptions
from dovetail_engine.pretrained import load_engine
from dovetail_engine.programs import ShapeError, compilation_cache

__all__ = ["Engine", "EngineOptions", "ShapeError", "compilation_cache", "load_engine"]
