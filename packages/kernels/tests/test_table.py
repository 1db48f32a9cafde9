"""The table of operations: what documentation, `prefer` and `tune` know."""

import inspect

import dovetail_kernels
from dovetail_kernels.table import OPERATIONS, markdown


def test_every_operation_is_a_public_function() -> None:
    """A name in the table that users do not have cannot be preferred or tuned by them."""
    names = [operation.name for operation in OPERATIONS]
    assert names == sorted(set(names))
    for name in names:
        function = getattr(dovetail_kernels, name)
        assert "implementation" in inspect.signature(function).parameters, name


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
