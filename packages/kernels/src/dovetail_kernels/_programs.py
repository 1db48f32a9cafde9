"""How an implementation is called: as one cached program, and by the partitioner where meshes have explicit axes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

__all__ = ["Outcome", "partitioned", "run"]

Axes: TypeAlias = Mapping[str, tuple[Any, ...]]
Outcome: TypeAlias = Callable[[Mapping[str, Any], Axes], Any]
"""Returns how a result is divided (`PartitionSpec`, or a tree of them), given the arguments and how each is divided."""


class Program(NamedTuple):
    """A call without its arrays: what is fixed when it is traced; hashable if all of it is."""

    function: Callable[..., Any]
    config: tuple[tuple[str, Any], ...]
    structure: Any
    still: tuple[tuple[type, Any] | None, ...]
    """What is not an array, in its place; the type tells 1 from 1.0 and True."""

    @classmethod
    def split(
        cls, function: Callable[..., Any], arguments: Mapping[str, Any], config: Mapping[str, Any]
    ) -> tuple["Program", list[Any]]:
        """Return the call of a function without its arrays, and the arrays."""
        leaves, structure = jax.tree.flatten(dict(arguments))
        still = tuple(None if _is_array(x) else (type(x), x) for x in leaves)
        program = cls(function, tuple(sorted(config.items())), structure, still)
        return program, [x for x in leaves if _is_array(x)]

    def __call__(self, *arrays: Any) -> Any:
        """Run with the arrays in their places."""
        given = iter(arrays)
        leaves = [next(given) if value is None else value[1] for value in self.still]
        return self.function(**jax.tree.unflatten(self.structure, leaves), **dict(self.config))


def run(name: str, function: Callable[..., Any], config: Mapping[str, Any], /, **arguments: Any) -> Any:
    """Call a function of named arguments as a program that is compiled once per kind of call, also outside of jit."""
    program, arrays = Program.split(function, arguments, config)
    try:
        hash(program)
    except TypeError:  # an implementation or an argument of the user's own
        return program(*arrays)
    return _jitted(name)(program, *arrays)


@functools.cache
def _jitted(name: str) -> Callable[..., Any]:
    def call(program: Program, *arrays: Any) -> Any:
        return program(*arrays)

    call.__name__ = call.__qualname__ = name
    return jax.jit(call, static_argnums=0)


def partitioned(function: Callable[..., Any], arguments: Mapping[str, Any], outcome: Outcome) -> Any:
    """Call a function of named arguments, with the partitioner at work inside where operands have explicit axes."""
    program, arrays = Program.split(function, arguments, {})
    if not any(axis is not None for x in arrays for axis in _axes(x)):
        return function(**arguments)
    axes = {name: _axes(value) for name, value in arguments.items()}
    return jax.sharding.auto_axes(program, out_sharding=outcome(arguments, axes))(*arrays)


def _axes(x: Any) -> tuple[Any, ...]:
    """Return the explicit mesh axes over which each axis of an array is divided, or None."""
    if not _is_array(x):
        return ()
    spec = jax.typeof(x).sharding.spec
    return (*spec, *(None,) * (x.ndim - len(spec)))


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))
