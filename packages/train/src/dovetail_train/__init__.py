"""A jitted, donated training step over any parameters, loss and optimizer, and a small trainer around it."""

from dovetail_train.explain import Explanation, explain
from dovetail_train.hooks import Checkpoint, End, Evaluate, Hook, evaluate
from dovetail_train.losses import next_token
from dovetail_train.sinks import JsonLines
from dovetail_train.step import Metrics, StepFunction, TrainState, init_state, make_step
from dovetail_train.throughput import Throughput
from dovetail_train.trainer import NonFiniteLossError, Trainer

__all__ = [
    "Checkpoint",
    "End",
    "Evaluate",
    "Explanation",
    "Hook",
    "JsonLines",
    "Metrics",
    "NonFiniteLossError",
    "StepFunction",
    "Throughput",
    "TrainState",
    "Trainer",
    "evaluate",
    "explain",
    "init_state",
    "make_step",
    "next_token",
]
