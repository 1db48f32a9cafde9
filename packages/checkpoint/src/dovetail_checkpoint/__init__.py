"""Atomic, asynchronous, verified checkpoints over Orbax.

Importing this package loads neither jax nor Orbax; both are imported when a manager first saves or restores.
"""

from dovetail_checkpoint.errors import CorruptCheckpointError, TreeMismatchError
from dovetail_checkpoint.keep import Committed, Policy, all_steps, best, every, latest
from dovetail_checkpoint.manager import Manager
from dovetail_checkpoint.manifest import Leaf, Manifest, StoredFile, verify

__all__ = [
    "Committed",
    "CorruptCheckpointError",
    "Leaf",
    "Manager",
    "Manifest",
    "Policy",
    "StoredFile",
    "TreeMismatchError",
    "all_steps",
    "best",
    "every",
    "latest",
    "verify",
]
