"""What a user says and asks about implementations: `prefer` and `explain`."""

import contextlib
import dataclasses
import difflib
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import jax

from dovetail_kernels.operation import Decision, Wanted, choices, policy
from dovetail_kernels.table import OPERATIONS

__all__ = ["Explanation", "explain", "prefer"]

PLATFORMS = ("cpu", "gpu", "tpu")


@contextlib.contextmanager
def prefer(*, everywhere: Wanted = None, platform: str | None = None, **operations: Wanted) -> Generator[None]:
    """Try these implementations first in whatever is traced inside.

    What cannot run a call is passed over; `explain` tells why. A jitted function that was traced outside is traced
    again: the preference is part of jax's cache key. Inner uses win over outer ones.

    Args:
        everywhere: for every operation that has an implementation of that name.
        platform: choose as on this platform, to lower a function for another machine.
        **operations: per operation, a name, an implementation, `configured` ones, or several in order.

    Raises:
        ValueError: an unknown operation, implementation or platform.

    >>> from dovetail_kernels import attention
    >>> q = jax.numpy.ones((1, 4, 1, 8))
    >>> with prefer(attention="reference"):
    ...     print(explain(lambda q: attention(q, q, q), q)[0].implementation.name)
    reference
    """
    if platform is not None and platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r}; expected one of {PLATFORMS}")
    known = {operation.name: operation for operation in OPERATIONS}
    for name, wanted in operations.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} is not an operation with implementations: {sorted(known)}{hint}")
        for choice in choices(wanted):
            known[name].named(choice.implementation)
    names = {x.name for operation in OPERATIONS for x in operation.implementations}
    for choice in choices(everywhere):
        if isinstance(choice.implementation, str) and choice.implementation not in names:
            raise ValueError(f"no operation has an implementation {choice.implementation!r}; there are {sorted(names)}")
    now = policy.value
    merged = {**dict(now.preferred), **{name: choices(wanted) for name, wanted in operations.items()}}
    new = dataclasses.replace(
        now,
        preferred=tuple(sorted(merged.items())),
        everywhere=choices(everywhere) + now.everywhere,
        platform=platform or now.platform,
    )
    with policy(new):
        yield


class Explanation(tuple[Decision, ...]):
    """Every decision of a trace, in order; prints as a table."""

    def __str__(self) -> str:
        """Return one block of lines per distinct decision."""
        counts = Counter(_describe(decision) for decision in self)
        return "\n".join(f"{count} x {text}" for text, count in counts.items())


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Trace a function, without running it, and return what every operation in it chose and why.

    Args:
        function: plain or jitted.
        *args: arrays, pytrees of them, or abstract ones.
        **kwargs: likewise.

    >>> from dovetail_kernels import attention
    >>> q = jax.numpy.ones((1, 4, 1, 8))
    >>> print(explain(lambda q: attention(q, q, q), q))
    1 x attention: blocked (default) on cpu
        query float32[1,4,1,8], key float32[1,4,1,8], value float32[1,4,1,8]
        not cudnn: needs platform gpu, not cpu
    """
    found = list[Decision]()
    with policy(dataclasses.replace(policy.value, record=found.append)):
        jax.eval_shape(function, *args, **kwargs)
    return Explanation(found)


def _describe(decision: Decision) -> str:
    call, config = decision.call, ", ".join(f"{k}={v}" for k, v in decision.config.items())
    shapes = [
        f"{name} {leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for name, value in call.arguments.items()
        for leaf in jax.tree.leaves(value)
        if hasattr(leaf, "dtype")
    ]
    head = f"{call.operation}: {decision.implementation.name}" + (f" [{config}]" if config else "")
    lines = [f"{head} ({decision.source}) on {call.platform}", ", ".join(shapes)]
    lines += [f"not {name}: {reason}" for name, reason in decision.rejected]
    return "\n    ".join(lines)
