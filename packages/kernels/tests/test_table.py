"""The table of operations: what documentation, `prefer` and `tune` know."""

import inspect

import dovetail_kernels
from dovetail_kernels.table import FUNCTIONS, OPERATIONS, markdown

MASKS = {"causal", "chunked", "dense", "lengths", "prefix", "segments", "window"}
CHOICES = {"configured", "explain", "prefer", "tune", "tuned"}
ON_THE_HOST = {"rope_axes", "rope_frequencies"}


def test_every_operation_is_a_public_function() -> None:
    """A name in the table that users do not have cannot be preferred or tuned by them."""
    names = [operation.name for operation in OPERATIONS]
    assert names == sorted(set(names))
    for name in names:
        function = getattr(dovetail_kernels, name)
        assert "implementation" in inspect.signature(function).parameters, name


def test_every_function_is_there() -> None:
    """A new function is in the documentation with its derivatives and errors, or it makes masks, choices or tables."""
    public = {name for name in dovetail_kernels.__all__ if inspect.isfunction(getattr(dovetail_kernels, name))}
    plain = [function.name for function in FUNCTIONS]
    assert plain == sorted(set(plain))
    assert {*plain, *(operation.name for operation in OPERATIONS)} == public - MASKS - CHOICES - ON_THE_HOST


def test_every_operation_has_the_textbook_form() -> None:
    """What is compared with, and what has every derivative; names in a table are unique."""
    for operation in OPERATIONS:
        names = [implementation.name for implementation in operation.implementations]
        assert names[-1] == "reference"
        assert len(set(names)) == len(names)


def test_documentation_says_it_all() -> None:
    """The documentation is generated: an implementation cannot be forgotten in it."""
    text = markdown()
    for operation in OPERATIONS:
        assert operation.accumulation in text
        assert operation.error in text
        for implementation in operation.implementations:
            assert f"| `{operation.name}` | `{implementation.name}` |" in text
    for function in FUNCTIONS:
        assert f"| `{function.name}` | cpu, gpu, tpu | {function.gradient} | {function.accumulation} |" in text
