"""Streaming safetensors in and out, with declarative reversible maps."""

from dovetail_weights.errors import WeightsError
from dovetail_weights.lazy import Lazy
from dovetail_weights.maps import Group, Rule, StackedMap, WeightMap
from dovetail_weights.reading import Directory, SafetensorsFile, open_directory
from dovetail_weights.transfer import check, load, save
from dovetail_weights.transforms import Cast, Concat, Reshape, Split, Stack, Transform, Transpose, Unstack
from dovetail_weights.writing import digest, write_directory

__all__ = [
    "Cast",
    "Concat",
    "Directory",
    "Group",
    "Lazy",
    "Reshape",
    "Rule",
    "SafetensorsFile",
    "Split",
    "Stack",
    "StackedMap",
    "Transform",
    "Transpose",
    "Unstack",
    "WeightMap",
    "WeightsError",
    "check",
    "digest",
    "load",
    "open_directory",
    "save",
    "write_directory",
]
