"""The private parts of jax that the walk over a program needs."""

from typing import Any

from jax._src.interpreters import partial_eval  # pyright: ignore[reportPrivateUsage]

__all__ = ["name_stack", "without_dead_code"]


def without_dead_code(jaxpr: Any) -> Any:
    """Return the jaxpr without equations that no output needs, inside of scans and nested calls too."""
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return live


def name_stack(equation: Any) -> str:
    """Return the named scopes and transformations of an equation, such as ``transpose(jvp(mlp))/inner``."""
    return str(equation.source_info.name_stack)
