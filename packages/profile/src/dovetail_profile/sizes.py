"""Sizes of what an equation reads and writes."""

import math
from collections.abc import Iterable
from typing import Any

__all__ = ["elements", "moved_bytes", "operand_bytes"]

_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}


def elements(atom: Any) -> int:
    """Return the number of elements of a variable; 0 if it is not an array."""
    return math.prod(getattr(atom.aval, "shape", (0,)))


def operand_bytes(atoms: Iterable[Any]) -> int:
    """Return the bytes of the given variables; literals are part of the code and weigh nothing."""
    return sum(_nbytes(atom) for atom in atoms if not hasattr(atom, "val"))


def moved_bytes(equation: Any) -> int:
    """Return the bytes of all operands and results of an equation."""
    return operand_bytes(equation.invars) + operand_bytes(equation.outvars)


def _nbytes(atom: Any) -> int:
    dtype: Any = getattr(atom.aval, "dtype", None)
    if dtype is None:
        return 0
    bits = _BITS.get(str(dtype)) or 8 * int(dtype.itemsize)
    return math.ceil(elements(atom) * bits / 8)
