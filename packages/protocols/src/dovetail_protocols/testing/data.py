"""Kits of `Loader` and `Plan`: order is a pure function, and a state is the position of the consumer."""

import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dovetail_protocols.batch import batch_size
from dovetail_protocols.loader import Loader, Plan
from dovetail_protocols.testing._rules import ConformanceError, difference, require, require_raises

__all__ = ["check_host_split", "check_loader", "check_loader_follows_plan", "check_plan"]

MakeLoader = Callable[[], Loader]
_AHEAD = 4


def _copied(batch: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), batch)


def _take(loader: Loader, count: int) -> list[Any]:
    return list(itertools.islice(loader, count))


def check_loader(
    make_loader: MakeLoader, *, steps: int = 4, make_other: MakeLoader | None = None, settle: float = 0.02
) -> None:
    """Check that a loader repeats itself exactly and resumes exactly where its state says.

    Args:
        make_loader: returns a fresh loader at the start of the same data; its first batches must differ from each
            other, or nothing can be told. A finite loader may be shorter than `steps`.
        steps: how many positions are saved and resumed.
        make_other: returns a loader over *other* data, whose state must be refused.
        settle: seconds given to a prefetcher to run ahead before a state is asked for.

    Raises:
        ConformanceError: a rule is broken.
        ValueError: the first batches are all equal.
    """
    loader = make_loader()
    require(iter(loader) is loader, "Loader: iter(loader) is the loader itself", iter=type(iter(loader)).__name__)
    expected = [_copied(batch) for batch in itertools.islice(loader, steps + _AHEAD)]
    if len(expected) > 1 and all(difference(batch, expected[0]) is None for batch in expected):
        raise ValueError("the first batches are all equal; make_loader must give data in which a position can be told")
    for batch in expected:
        _check_batch(batch)
    _check_fresh(make_loader, expected)
    for taken in range(min(steps, len(expected)) + 1):
        _check_position(make_loader, expected, taken, settle)
    _check_buffers(make_loader, expected)
    if make_other is not None:
        foreign = make_other().get_state()
        require_raises(
            ValueError,
            "Loader: set_state refuses the state of other data",
            lambda: make_loader().set_state(foreign),
        )


def _check_batch(batch: Any) -> None:
    try:
        batch_size(batch)
    except ValueError as error:
        raise ConformanceError(f"Loader: the leaves of a batch share their leading axis; {error}") from error


def _check_fresh(make_loader: MakeLoader, expected: Sequence[Any]) -> None:
    first, second = make_loader(), make_loader()
    _take(first, 2)
    for step, batch in enumerate(_take(second, len(expected))):
        text = difference(batch, expected[step])
        require(text is None, "Loader: two fresh loaders give the same batches and share nothing", step=step, diff=text)


def _check_position(make_loader: MakeLoader, expected: Sequence[Any], taken: int, settle: float) -> None:
    loader = make_loader()
    _take(loader, taken)
    time.sleep(settle)
    state = loader.get_state()
    stored = _stored(state)
    again = loader.get_state()
    require(again == state, "Loader: get_state changes nothing", first=state, second=again)
    _expect_rest(loader, expected, taken, "Loader: get_state does not move the loader")
    require(state == stored, "Loader: a state is a value, not a view of the running loader", was=stored, now=state)

    given = copy.deepcopy(stored)
    resumed = make_loader()
    resumed.set_state(given)
    _expect_rest(resumed, expected, taken, "Loader: a fresh loader continues exactly where get_state was called")
    require(given == stored, "Loader: set_state does not keep or change the state it is given", was=stored, now=given)
    loader.set_state(copy.deepcopy(stored))
    _expect_rest(loader, expected, taken, "Loader: set_state moves a used loader back")


def _stored(state: Any) -> Any:
    require(isinstance(state, dict), "Loader: get_state returns a dict", state=state)
    try:
        stored = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConformanceError(f"Loader: a state is JSON-serialisable; got {state!r}: {error}") from error
    require(stored == state, "Loader: a state survives JSON unchanged", state=state, after=stored)
    return stored


def _expect_rest(loader: Loader, expected: Sequence[Any], taken: int, rule: str) -> None:
    wanted = expected[taken : taken + 2]
    got = _take(loader, len(wanted))
    require(len(got) == len(wanted), rule, position=taken, batches=len(got), expected=len(wanted))
    for offset, (batch, right) in enumerate(zip(got, wanted, strict=True)):
        text = difference(batch, right)
        if text is None:
            continue
        found = [step for step, other in enumerate(expected) if difference(batch, other) is None]
        where = f"it gave batch {found[0]}" if found else f"a batch of no known step ({text})"
        raise ConformanceError(f"{rule}; at position {taken} batch {taken + offset} was due, {where}")


def _check_buffers(make_loader: MakeLoader, expected: Sequence[Any]) -> None:
    kept = _take(make_loader(), len(expected))
    for step, batch in enumerate(kept):
        text = difference(batch, expected[step])
        require(text is None, "Loader: a batch is not overwritten by a later one", step=step, diff=text)


def check_plan(plan: Plan, *, steps: int = 4, twin: Plan | None = None, other: Plan | None = None) -> None:
    """Check that `plan.at` is a pure function of the step.

    Args:
        plan: a plan of at least `steps` steps.
        steps: how many steps are read.
        twin: a plan made again from the same data and seed; it must agree.
        other: a plan of other data or another seed; its fingerprint must differ.

    Raises:
        ConformanceError: a rule is broken.
    """
    mark = plan.fingerprint
    require(isinstance(mark, str) and mark, "Plan: the fingerprint is a string that is not empty", fingerprint=mark)
    expected = [_copied(plan.at(step)) for step in range(steps)]
    for leaf in jax.tree.leaves(plan.at(0)):
        require(isinstance(leaf, np.ndarray), "Plan: at(step) gives NumPy arrays", leaf=type(leaf).__name__)
    _check_pure(plan, expected, [*reversed(range(steps)), 0, 0])
    for leaf in jax.tree.leaves(plan.at(0)):
        if leaf.flags.writeable:
            leaf[...] = np.zeros_like(leaf)
    _check_pure(plan, expected, [0])
    require(plan.fingerprint == mark, "Plan: the fingerprint does not change with use", was=mark, now=plan.fingerprint)
    _check_bounds(plan)
    if twin is not None:
        require(twin.fingerprint == mark, "Plan: the same data and seed have the same fingerprint")
        _check_pure(twin, expected, range(steps))
    if other is not None:
        require(other.fingerprint != mark, "Plan: other data or seeds have another fingerprint", fingerprint=mark)


def _check_pure(plan: Plan, expected: Sequence[Any], order: Sequence[int]) -> None:
    for step in order:
        text = difference(plan.at(step), expected[step])
        require(
            text is None, "Plan: at(step) depends on the step alone, whatever was read before", step=step, diff=text
        )


def _check_bounds(plan: Plan) -> None:
    require_raises(IndexError, "Plan: a negative step is an IndexError", lambda: plan.at(-1))
    length = getattr(plan, "__len__", None)
    if length is not None:
        end = length()
        require_raises(IndexError, f"Plan: step {end}, past the end, is an IndexError", lambda: plan.at(end))


def check_loader_follows_plan(make_loader: MakeLoader, plan: Plan, *, steps: int = 4) -> None:
    """Check that the loader of a single host gives the plan's batches in order.

    Raises:
        ConformanceError: a batch differs.
    """
    check_host_split(lambda _index, _count: make_loader(), plan, counts=(1,), steps=steps)


def check_host_split(
    make_loader: Callable[[int, int], Loader], plan: Plan, *, counts: Sequence[int] = (1, 2), steps: int = 3
) -> None:
    """Check that the hosts' batches, joined in host order, are the plan's global batch for every host count.

    Args:
        make_loader: ``make_loader(host, hosts)`` returns the loader of one host.
        plan: the plan that the loaders follow.
        counts: numbers of hosts; each divides the global batch.
        steps: how many steps are compared.

    Raises:
        ConformanceError: rows are missing, doubled or in another order.
    """
    for count in counts:
        loaders = [make_loader(host, count) for host in range(count)]
        for step in range(steps):
            parts = [next(loader) for loader in loaders]
            joined = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts)
            text = difference(joined, plan.at(step))
            rule = "Loader: the batches of all hosts, joined in host order, are the plan's batch"
            require(text is None, rule, hosts=count, step=step, diff=text)
