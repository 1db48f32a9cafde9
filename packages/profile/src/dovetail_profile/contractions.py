"""Multiply-adds of matrix products and convolutions."""

import math
from typing import Any

import numpy as np

from dovetail_profile.counts import Counts
from dovetail_profile.sizes import elements, moved_bytes

__all__ = ["convolution", "dot_general", "ragged_dot"]


def _matmul(equation: Any, multiply_adds: int) -> Counts:
    complex_ = any(np.issubdtype(v.aval.dtype, np.complexfloating) for v in equation.invars[:2])
    return Counts(matmul_flops=multiply_adds * (8 if complex_ else 2), bytes=moved_bytes(equation))


def dot_general(equation: Any) -> Counts:
    """Count batch x rows x columns x contracted multiply-adds."""
    (contract, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return _matmul(equation, elements(equation.outvars[0]) * math.prod(shape[d] for d in contract))


def ragged_dot(equation: Any) -> Counts:
    """Count every row of the left operand with one group of the right one."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (_, rhs_batch) = numbers.dot_dimension_numbers
    del lhs_contract
    groups = numbers.rhs_group_dimensions
    shape = equation.invars[1].aval.shape
    free = math.prod(n for d, n in enumerate(shape) if d not in (*rhs_contract, *rhs_batch, *groups))
    return _matmul(equation, elements(equation.invars[0]) * free)


def convolution(equation: Any) -> Counts:
    """Count the products with valid input elements: not those with padding or with the holes of a dilation."""
    p, lhs, rhs, out = equation.params, *(v.aval.shape for v in (*equation.invars[:2], equation.outvars[0]))
    numbers = p["dimension_numbers"]
    pairs = 1
    for d, (i, k, o) in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)):
        position = np.arange(out[o])[:, None] * p["window_strides"][d] + np.arange(rhs[k]) * p["rhs_dilation"][d]
        position -= p["padding"][d][0]
        dilation = p["lhs_dilation"][d]
        inside = (position >= 0) & (position < (lhs[i] - 1) * dilation + 1) & (position % dilation == 0)
        pairs *= int(inside.sum())
    outer = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    return _matmul(equation, outer * rhs[numbers.rhs_spec[1]] * pairs)
