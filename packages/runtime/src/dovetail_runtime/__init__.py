"""Meshes, logical sharding rules, process bootstrap and the preemption flag."""

from dovetail_runtime.batches import batch_sharding, put_batch
from dovetail_runtime.bootstrap import Process, barrier, initialize, shutdown
from dovetail_runtime.context import constrain, current, split_of, use
from dovetail_runtime.mesh import mesh
from dovetail_runtime.preempt import PreemptionFlag, preemption
from dovetail_runtime.resolve import Resolution, ShardingError, explain, resolve
from dovetail_runtime.rules import (
    CONTEXT,
    DATA,
    EXPERT,
    FSDP,
    FSDP_TENSOR,
    LOGICAL_NAMES,
    SEQUENCE,
    TENSOR,
    AxisRules,
    Rules,
)
from dovetail_runtime.shardings import Row, Table, shardings, shardings_like, table

__all__ = [
    "CONTEXT",
    "DATA",
    "EXPERT",
    "FSDP",
    "FSDP_TENSOR",
    "LOGICAL_NAMES",
    "SEQUENCE",
    "TENSOR",
    "AxisRules",
    "PreemptionFlag",
    "Process",
    "Resolution",
    "Row",
    "Rules",
    "ShardingError",
    "Table",
    "barrier",
    "batch_sharding",
    "constrain",
    "current",
    "explain",
    "initialize",
    "mesh",
    "preemption",
    "put_batch",
    "resolve",
    "shardings",
    "shardings_like",
    "shutdown",
    "split_of",
    "table",
    "use",
]
