"""Kit of `Servable`: what the specs say is what goes in and comes out, and everything else is refused."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dovetail_protocols.servable import Servable, TensorSpec
from dovetail_protocols.testing._rules import ConformanceError, difference, require, require_raises

__all__ = ["check_servable"]

Inputs = Mapping[str, Any]


def check_servable(
    servable: Servable, *, sizes: Sequence[int] = (1, 3), make_inputs: Callable[[int], Inputs] | None = None
) -> None:
    """Check a servable.

    Args:
        servable: the servable.
        sizes: lengths that every symbolic axis is tried with.
        make_inputs: ``make_inputs(size)`` returns good inputs; by default small random numbers (integers 0 or 1).

    Raises:
        ConformanceError: a rule is broken.
    """
    require(servable.inputs and servable.outputs, "Servable: it names its inputs and outputs")
    for size in sizes:
        given = dict(make_inputs(size)) if make_inputs else _inputs(servable.inputs, size)
        _check_call(servable, given)
    given = dict(make_inputs(sizes[0])) if make_inputs else _inputs(servable.inputs, sizes[0])
    _check_refusals(servable, given)


def _inputs(specs: Mapping[str, TensorSpec], size: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def value(spec: TensorSpec) -> np.ndarray:
        shape = [size if isinstance(axis, str) else axis for axis in spec.shape]
        if np.issubdtype(np.dtype(spec.dtype), np.floating):
            return rng.standard_normal(shape).astype(spec.dtype)
        return rng.integers(0, 2, shape).astype(spec.dtype)

    return {name: value(spec) for name, spec in specs.items()}


def _check_call(servable: Servable, given: dict[str, Any]) -> None:
    before = {name: np.array(value) for name, value in given.items()}
    axes: dict[str, int] = {}
    for name, spec in servable.inputs.items():
        spec.bind(name, given[name], axes)
    got = servable(given)
    require(set(got) == set(servable.outputs), "Servable: it returns the outputs that it names", outputs=sorted(got))
    for name, spec in servable.outputs.items():
        try:
            spec.bind(name, got[name], axes)
        except ValueError as error:
            message = f"Servable: every output fits its spec, symbolic axes as in the inputs; {error}"
            raise ConformanceError(message.replace("input", "output", 1)) from error
    text = difference(given, before)
    require(text is None, "Servable: a call does not change its inputs", diff=text)
    text = difference(servable(given), got)
    require(text is None, "Servable: the same inputs give the same outputs", diff=text)


def _check_refusals(servable: Servable, given: dict[str, Any]) -> None:
    name = next(iter(given))
    value = np.asarray(given[name])
    wrong = np.int16 if value.dtype != np.int16 else np.int8
    cases = {
        "a missing input": ({key: item for key, item in given.items() if key != name}, name),
        "an unknown input": ({**given, "no_such_input": value}, "no_such_input"),
        "another dtype": ({**given, name: value.astype(wrong)}, name),
        "another rank": ({**given, name: value[None]}, name),
        **_wrong_axes(servable.inputs, given),
    }
    for what, (inputs, says) in cases.items():
        rule = f"Servable: {what} is a ValueError that names the input"
        require_raises(ValueError, rule, lambda inputs=inputs: servable(inputs), says=(says,))


def _wrong_axes(specs: Mapping[str, TensorSpec], given: Inputs) -> dict[str, tuple[dict[str, Any], str]]:
    seen: set[int | str] = set()
    cases: dict[str, tuple[dict[str, Any], str]] = {}
    for name, spec in specs.items():
        for position, axis in enumerate(spec.shape):
            if np.size(given[name]) and (isinstance(axis, int) or axis in seen):
                longer = np.concatenate([given[name], given[name]], position)
                # Of two inputs that disagree on a symbolic axis either may be named.
                blamed = name if isinstance(axis, int) else ""
                cases[f"a wrong axis {position} of {name!r}"] = ({**given, name: longer}, blamed)
            seen.add(axis)
    return cases
