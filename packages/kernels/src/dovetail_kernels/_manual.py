"""Operands of custom gradients inside ``jax.shard_map``, where types say over which mesh axes values differ."""

from typing import Any

import jax

__all__ = ["alike"]


def alike(*operands: Any) -> tuple[Any, ...]:
    """Return the operands, all marked as varying over the mesh axes that any of them varies over.

    The gradient of the mark is the sum over those axes, which a custom gradient rule cannot know of. Outside
    ``shard_map`` the operands are returned as they are. None stays None.
    """
    sets = [frozenset[str]() if x is None else jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset[str]().union(*sets)
    return tuple(
        x if x is None or have == union else jax.lax.pcast(x, tuple(union - have), to="varying")
        for x, have in zip(operands, sets, strict=True)
    )
