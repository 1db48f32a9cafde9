"""One operation, several implementations of it, and which of them runs.

The first of these that can decides: the argument ``implementation=`` of a call, what `prefer` asks for, what was found
faster by `tune` (inside `tuned`), the order of the operation's table. All of it happens while a function is traced.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax

from dovetail_kernels._programs import Outcome, partitioned, run

__all__ = [
    "Call",
    "Configured",
    "Decision",
    "Implementation",
    "Operation",
    "Policy",
    "SupportsCall",
    "UnsupportedError",
    "Wanted",
    "configured",
    "policy",
]


class UnsupportedError(ValueError):
    """The implementation that a call insists on cannot run it; the message says why, for each that was tried."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What an implementation may look at to tell whether it can run.

    Attributes:
        operation: its name.
        arguments: by name; arrays as `jax.ShapeDtypeStruct`, everything else as it is.
        platform: "cpu", "gpu" or "tpu".
    """

    operation: str
    arguments: Mapping[str, Any]
    platform: str


@runtime_checkable
class SupportsCall(Protocol):
    """What any implementation offers; a user's own needs no more, and is called with the arguments by name."""

    @property
    def name(self) -> str:
        """What tables and explanations call it."""
        ...

    def supports(self, call: Call, /) -> Literal[True] | str:
        """Return True, or the reason why not."""
        ...

    def __call__(self, **arguments: Any) -> Any:
        """Run; what `configs` offers arrives as further keywords."""
        ...


def _always(call: Call) -> Literal[True]:
    del call
    return True


def _none(call: Call) -> Iterable[Mapping[str, Any]]:
    del call
    return ()


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: as in ``implementation=``.
        function: takes the operation's arguments by name, and the keywords of a configuration.
        supports: returns True or the reason why not.
        configs: configurations worth trying for a call, besides the implementation's own choice.
        platforms: where it is meant to be used.
        gradient: which derivatives it has.
        features: what it cannot do or does especially well.
    """

    name: str
    function: Callable[..., Any]
    supports: Callable[[Call], Literal[True] | str] = _always
    configs: Callable[[Call], Iterable[Mapping[str, Any]]] = _none
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    gradient: str = "any"
    features: str = "all"

    def __call__(self, **arguments: Any) -> Any:
        """Run `function`."""
        return self.function(**arguments)


@dataclasses.dataclass(frozen=True)
class Configured:
    """An implementation with a fixed configuration; see `configured`."""

    implementation: "str | SupportsCall"
    config: tuple[tuple[str, Any], ...]


Wanted: TypeAlias = "str | SupportsCall | Configured | Sequence[str | SupportsCall | Configured] | None"
"""What ``implementation=`` and `prefer` take: a name, an object, either with a configuration, or several in order."""


def configured(implementation: "str | SupportsCall", **config: Any) -> Configured:
    """Return an implementation with a fixed configuration, for ``implementation=`` or `prefer`.

    >>> configured("blocked", rows=64).config
    (('rows', 64),)
    """
    return Configured(implementation, tuple(sorted(config.items())))


class Decision(NamedTuple):
    """What ran for one call, and why.

    Attributes:
        call: what was asked for.
        implementation: what runs.
        config: its keywords; empty where it chooses itself.
        source: who decided.
        rejected: names and reasons of what came first but could not run.
    """

    call: Call
    implementation: SupportsCall
    config: Mapping[str, Any]
    source: str
    rejected: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Policy:
    """The part of a trace's context that choices depend on; jax traces anew where it differs.

    Attributes:
        preferred: per operation, what to try first.
        everywhere: what to try first in every operation that has it.
        platform: trace as if for this platform.
        lookup: returns what was found fastest for a call, with the reason, or None; hashable.
        record: called with every decision.
    """

    preferred: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    everywhere: tuple[Any, ...] = ()
    platform: str | None = None
    lookup: Callable[["Operation", Call], tuple[Configured, str] | None] | None = None
    record: Callable[[Decision], None] | None = None


policy = jax.make_user_context(Policy())


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A table of implementations.

    Attributes:
        name: that of the function.
        implementations: in the order in which they are tried.
        accumulation: the dtype of sums.
        error: bound of the error against a float64 reference, in words.
        key: names and values of a call that a configuration depends on: exact ones, and sizes to round.
        outcome: how results are divided over explicit mesh axes; None where operations of jax find out.
    """

    name: str
    implementations: tuple[Implementation, ...]
    accumulation: str
    error: str
    key: Callable[[Call], tuple[Mapping[str, Any], Mapping[str, int]]] | None = None
    outcome: Outcome | None = None

    def __call__(self, wanted: Wanted, **arguments: Any) -> Any:
        """Choose an implementation and run it."""
        decision = self.decide(wanted, arguments)
        if (record := policy.value.record) is not None:
            record(decision)

        call = functools.partial(run, self.name, decision.implementation, decision.config)
        return call(**arguments) if self.outcome is None else partitioned(call, arguments, self.outcome)

    def decide(self, wanted: Wanted, arguments: Mapping[str, Any]) -> Decision:
        """Return what will run and why.

        Raises:
            UnsupportedError: nothing that `wanted` names can run.
            ValueError: a name that this operation does not have.
        """
        now = policy.value
        call = Call(self.name, {k: jax.tree.map(_abstract, v) for k, v in arguments.items()}, now.platform or _here())
        rejected = list[tuple[str, str]]()
        for choice, source in self._candidates(wanted, now, call):
            implementation = self.named(choice.implementation)
            reason = implementation.supports(call)
            if reason is True:
                return Decision(call, implementation, dict(choice.config), source, tuple(rejected))
            if not isinstance(reason, str):
                raise TypeError(f"{implementation.name}.supports returned {reason!r}; expected True or a reason")
            rejected.append((implementation.name, reason))
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in rejected)
        raise UnsupportedError(f"{self.name}: implementation={wanted!r} cannot run this call{reasons}")

    def named(self, wanted: "str | SupportsCall") -> SupportsCall:
        """Return the implementation of a name.

        Raises:
            ValueError: there is none, with the nearest name.
            TypeError: neither a name nor an implementation.
        """
        if not isinstance(wanted, str):
            if not isinstance(wanted, SupportsCall):
                raise TypeError(f"{wanted!r}; expected a name or an object with name, supports(call) and __call__")
            return wanted
        names = [implementation.name for implementation in self.implementations]
        if wanted not in names:
            near = difflib.get_close_matches(wanted, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.name} has no implementation {wanted!r}; expected one of {names}{hint}")
        return self.implementations[names.index(wanted)]

    def _candidates(self, wanted: Wanted, now: Policy, call: Call) -> Iterable[tuple[Configured, str]]:
        if wanted is not None:
            yield from ((choice, "implementation=") for choice in choices(wanted))
            return
        yield from ((choice, "prefer") for choice in choices(dict(now.preferred).get(self.name, ())))
        own = {implementation.name for implementation in self.implementations}
        for choice in choices(now.everywhere):
            if not isinstance(choice.implementation, str) or choice.implementation in own:
                yield choice, "prefer"
        if now.lookup is not None and (found := now.lookup(self, call)) is not None:
            yield found
        yield from ((Configured(x, ()), "default") for x in self.implementations)


def choices(wanted: Wanted) -> tuple[Configured, ...]:
    """Return what was asked for as a tuple."""
    if wanted is None:
        return ()
    several: Any = wanted if isinstance(wanted, (tuple, list)) else (wanted,)
    return tuple(x if isinstance(x, Configured) else Configured(x, ()) for x in several)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x


def _here() -> str:
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.default_backend()
    return chosen if isinstance(chosen, str) else chosen.platform
