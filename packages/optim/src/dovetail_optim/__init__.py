"""What optax lacks: schedules and parameter groups by path."""

from dovetail_optim.adamw import adamw, decay_matrices
from dovetail_optim.groups import GroupOptions, group
from dovetail_optim.schedules import Schedule, cosine, inverse_sqrt, linear, wsd

__all__ = [
    "GroupOptions",
    "Schedule",
    "adamw",
    "cosine",
    "decay_matrices",
    "group",
    "inverse_sqrt",
    "linear",
    "wsd",
]
