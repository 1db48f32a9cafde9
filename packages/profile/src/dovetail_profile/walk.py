"""Count what a JAX program costs by walking its jaxpr: loops times their length, nothing is compiled or run."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage]

from dovetail_profile._jaxcompat import name_stack, without_dead_code
from dovetail_profile.counts import Cost, Counts
from dovetail_profile.primitives import leaf_counts
from dovetail_profile.sizes import elements, moved_bytes, operand_bytes

__all__ = ["CostError", "cost"]

# Primitives that run one body once.
_CALLS = [
    "call",
    "checkpoint",
    "closed_call",
    "core_call",
    "core_closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_vmap_call",
    "eval_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
    "remat_call",
    "run_state",
]
# Parts of a name stack that jax adds itself.
_INTERNAL = frozenset(("rematted_computation", "checkpoint", ""))
_STATED = re.compile(r"trips=([\d.e+]+)")


class CostError(ValueError):
    """The cost of a program depends on values that are not known."""


def cost(f: Callable[..., Any], *args: Any, while_trips: float | None = None, **kwargs: Any) -> Cost:
    """Return what one call of `f` costs, counted over its jaxpr after dead code is removed.

    Conventions:

    - A multiply-add of a matrix product or convolution is 2 flops (``2 M N K``), in `matmul_flops`. An elementwise
      operation is 1 flop per output element, a reduction 1 per element that it folds in; transcendental functions are
      counted apart. Moving or converting data is no flop. Sorting n elements counts ``n ceil(log2 n)``.
    - A ``scan`` (and a ``fori_loop`` with a known trip count) is its body times its length. Of the branches of a
      ``cond`` the most expensive one counts. A ``while_loop`` needs `while_trips`, or runs in a scope that states its
      iterations, such as ``jax.named_scope("trips=8.5")``: a mean, so counts are rounded.
    - ``jax.checkpoint`` under a gradient counts what is computed again.
    - A ``shard_map`` counts for all devices of its axes: the result is global, like that of the unsharded program.
    - A Pallas call counts its ``cost_estimate`` if it has one, otherwise its body times its grid.
    - `bytes` are operands and results of every equation as if nothing were fused, `io_bytes` arguments and outputs.
    - Scopes come from ``jax.named_scope``; forward and backward work of a scope are added up, and a scope directly
      inside one of the same name is merged with it.

    Args:
        f: any function that jax can trace, jitted or not.
        *args: arrays or ``jax.ShapeDtypeStruct``, in pytrees.
        while_trips: the number of iterations to assume for every ``while_loop`` that states none.
        **kwargs: more arguments of `f`.

    Raises:
        CostError: there is a ``while_loop`` that states no iterations, and no `while_trips`.
        ValueError: `while_trips` is negative.

    >>> import jax.numpy as jnp
    >>> x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)
    >>> cost(jnp.dot, x, w).flops == 2 * 8 * 16 * 4
    True
    """
    if while_trips is not None and (isinstance(while_trips, bool) or while_trips < 0):
        raise ValueError(f"while_trips={while_trips!r}; give the number of iterations, at least 0")
    closed = jax.make_jaxpr(f)(*args, **kwargs)
    jaxpr = without_dead_code(closed.jaxpr)
    io_bytes = operand_bytes(jaxpr.invars) + operand_bytes(jaxpr.outvars) + operand_bytes(jaxpr.constvars)
    counted = _walk(jaxpr, "", while_trips)
    return Cost(counted.entries, io_bytes, counted.uncounted)


def _walk(jaxpr: Any, outer: str, trips: float | None) -> Cost:
    entries: dict[tuple[str, str], Counts] = {}
    uncounted: frozenset[str] = frozenset()
    for equation in jaxpr.eqns:
        stack = name_stack(equation)
        stated = _STATED.findall(stack)
        part = _equation(equation, _scope(outer, stack), float(stated[-1]) if stated else trips)
        uncounted |= part.uncounted
        for key, counts in part.entries.items():
            entries[key] = entries.get(key, Counts()) + counts
    return Cost(entries, 0, uncounted)


def _equation(equation: Any, scope: str, trips: float | None) -> Cost:
    name, params = equation.primitive.name, equation.params
    if name in _CONTROL:
        return _CONTROL[name](equation, scope, trips)
    bodies = [] if _combines(name) else [body for value in params.values() for body in _bodies(value)]
    if name in _CALLS and bodies:
        return _walk(bodies[0], scope, trips)
    if bodies:
        inside = sum((_walk(body, scope, trips) for body in bodies), Cost())
        return Cost(inside.entries, 0, inside.uncounted | {name})
    counts, known = leaf_counts(equation)
    return Cost({(scope, name): counts}, 0, frozenset() if known else frozenset({name}))


def _combines(name: str) -> bool:
    """Tell whether the primitive's body only says how to combine two elements."""
    return name.startswith(("scatter", "reduce_window", "select_and_scatter")) or name == "sort"


def _scope(outer: str, stack: str) -> str:
    parts = [part for part in outer.split("/") if part]
    for part in re.sub(r"[A-Za-z_]\w*\(|\)", "", _STATED.sub("", stack)).split("/"):
        if part not in _INTERNAL and (not parts or parts[-1] != part):
            parts.append(part)
    return "/".join(parts)


def _bodies(value: Any) -> list[Any]:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return [_open(value)]
    if isinstance(value, tuple | list):
        return [_open(v) for v in value if isinstance(v, ClosedJaxpr | Jaxpr)]
    return []


def _open(body: Any) -> Any:
    return body.jaxpr if isinstance(body, ClosedJaxpr) else body


def _scan(equation: Any, scope: str, trips: float | None) -> Cost:
    return _walk(_open(equation.params["jaxpr"]), scope, trips) * equation.params["length"]


def _while(equation: Any, scope: str, trips: float | None) -> Cost:
    if trips is None:
        where = f"in scope {scope!r}" if scope else "outside of any named scope"
        raise CostError(
            f"a while_loop {where} has no known trip count; pass while_trips=n, or write it as a scan or a fori_loop "
            "with fixed bounds"
        )
    body = _walk(_open(equation.params["body_jaxpr"]), scope, trips)
    return body * trips + _walk(_open(equation.params["cond_jaxpr"]), scope, trips) * (trips + 1)


def _cond(equation: Any, scope: str, trips: float | None) -> Cost:
    branches = [_walk(_open(branch), scope, trips) for branch in equation.params["branches"]]
    most = max(branches, key=lambda c: (c.flops, c.transcendentals, c.bytes))
    return Cost(most.entries, 0, most.uncounted)


def _shard_map(equation: Any, scope: str, trips: float | None) -> Cost:
    sizes = dict(equation.params["mesh"].shape)
    shards = math.prod(sizes[axis] for axis in equation.params["newly_manual_axes"])
    return _walk(_open(equation.params["jaxpr"]), scope, trips) * shards


def _linear_solve(equation: Any, scope: str, trips: float | None) -> Cost:
    return _walk(_open(equation.params["jaxprs"].solve), scope, trips)


def _reduce(equation: Any, scope: str, trips: float | None) -> Cost:
    folds = sum(map(elements, equation.invars[: len(equation.outvars)]))
    folds -= sum(map(elements, equation.outvars))
    once = _walk(_open(equation.params["jaxpr"]), scope, trips).total
    moved = moved_bytes(equation)
    times = folds // max(1, len(equation.outvars))
    return Cost({(scope, "reduce"): Counts(0, once.other_flops * times, once.transcendentals * times, moved)})


def _pallas(equation: Any, scope: str, trips: float | None) -> Cost:
    moved = moved_bytes(equation)
    estimate = equation.params.get("cost_estimate")
    if estimate is not None:
        counts = Counts(int(estimate.flops), 0, int(estimate.transcendentals), int(estimate.bytes_accessed))
        return Cost({(scope, "pallas_call"): counts})
    grid = equation.params["grid_mapping"].grid
    if not all(isinstance(n, int) for n in grid):
        return Cost({(scope, "pallas_call"): Counts(bytes=moved)}, 0, frozenset({"pallas_call"}))
    inside = _walk(_open(equation.params["jaxpr"]), scope, trips) * math.prod(grid)
    total = inside.total
    counts = Counts(total.matmul_flops, total.other_flops, total.transcendentals, moved)
    return Cost({(scope, "pallas_call"): counts}, 0, inside.uncounted)


_CONTROL: dict[str, Callable[[Any, str, float | None], Cost]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "custom_linear_solve": _linear_solve,
    "reduce": _reduce,
    "pallas_call": _pallas,
}
