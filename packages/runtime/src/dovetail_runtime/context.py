"""`constrain` by logical names inside an explicit context that every jax cache sees.

The context is a `jax.make_user_context` value: it is local to the thread and part of the key of jax's tracing, lowering
and compilation caches. A jitted function, a scan body or a nested jit that was traced under one mesh and rules is
therefore traced again under others, and never reused across them.

Making such a value lengthens jax's cache keys, so a function that was jitted before this module was imported is
traced once more on its next call.
"""

import contextlib
import logging
from collections.abc import Generator
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dovetail_runtime.resolve import ShardingError, explain
from dovetail_runtime.rules import Rules

__all__ = ["constrain", "current", "split_of", "use"]

_log = logging.getLogger("dovetail_runtime")


@dataclass(frozen=True)
class Context:
    """What `use` entered."""

    mesh: Mesh
    rules: Rules


_context = jax.make_user_context(None)


def current() -> Context | None:
    """Return the mesh and rules of the innermost `use` of this thread, or None."""
    return _context.value


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Generator[None]:
    """Give `constrain` a mesh and rules, in this thread and until the block ends.

    The context acts while jax traces: enter it around the calls of a jitted function (every call, also the ones that
    hit the cache) or inside the function. A call outside of it, or under another mesh or rules, is traced anew.

    Raises:
        TypeError: `mesh` is not a `jax.sharding.Mesh` or `rules` not `Rules`.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"use(mesh, rules): mesh is {mesh!r}; make one with dovetail_runtime.mesh(...)")
    if not isinstance(rules, Rules):
        raise TypeError(f"use(mesh, rules): rules is {rules!r}; pass a preset such as FSDP, or Rules(...)")
    with _context(Context(mesh, rules)):
        yield


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of an activation by its logical names; without a context, return it as it is.

    On a mesh of one device the names are checked and nothing else happens. Inside ``jax.shard_map`` the axes that are
    manual there are left out. On a mesh with explicit axes it reshards.

    Args:
        x: an array, traced or not.
        *names: one name of the activation rules, or None, per dimension.

    Raises:
        ShardingError: the names do not fit the rank or the rules.

    >>> from dovetail_runtime import FSDP, mesh
    >>> import jax.numpy as jnp
    >>> with use(mesh(fsdp=8), FSDP):
    ...     print(jax.jit(lambda x: constrain(x, "batch", "embed"))(jnp.ones((8, 2))).sharding.spec)
    P('fsdp',)
    """
    context = current()
    if context is None:
        return x
    mesh, rules = context.mesh, context.rules
    resolution = explain(names, x.shape, rules.of("activations"), mesh, conflict=rules.conflict)
    if mesh.size == 1:
        return x
    for note in resolution.notes:
        _log.warning("constraint %s of an array of shape %s: %s", names, x.shape, note)
    return _apply(x, mesh, resolution.spec)


def split_of(name: str) -> tuple[Mesh, str] | None:
    """Return the mesh and the axis of it that the activation rules split a logical name over, or None if they do not.

    A mixer must know how ``time`` is split: attention within rows is then more than an operation on the whole array.

    Raises:
        ShardingError: the rules split the name over several axes of the mesh.

    >>> from dovetail_runtime import CONTEXT, mesh
    >>> with use(mesh(context=8), CONTEXT):
    ...     print(split_of("time")[1], split_of("vocab"))
    context None
    """
    context = current()
    axes = () if context is None else context.rules.of("activations").get(name, ())
    axes = [axis for axis in axes if context is not None and context.mesh.shape.get(axis, 1) > 1]
    if context is None or not axes:
        return None
    if len(axes) > 1:
        raise ShardingError(f"the rules split {name!r} over {axes}; expected one axis of the mesh")
    return context.mesh, axes[0]


def _apply(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    if not manual:
        explicit = AxisType.Explicit in mesh.axis_types
        place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
        return place(x, NamedSharding(mesh, spec))
    if manual >= set(mesh.axis_names):
        return x
    kept = [_without(part, manual) for part in spec]
    return jax.lax.with_sharding_constraint(x, NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(*kept)))


def _without(part: str | tuple[str, ...] | None, manual: set[str]) -> tuple[str, ...] | None:
    axes = (part,) if isinstance(part, str) else part or ()
    return tuple(axis for axis in axes if axis not in manual) or None
