"""How much each primitive computes and moves: one function from an equation to `Counts`.

The model is that of the equations as written, before XLA fuses or rewrites them. Operations that only move, convert or
label data compute nothing; `reshape` and its kin do not even move anything. Random bits are integer work that is not
counted. A gather or slice reads what it returns, an update writes what it is given (in place).
"""

import math
from collections.abc import Callable
from typing import Any

from dovetail_profile.contractions import convolution, dot_general, ragged_dot
from dovetail_profile.counts import Counts
from dovetail_profile.sizes import elements, moved_bytes, operand_bytes

__all__ = ["leaf_counts"]

_ARITHMETIC = """
    abs add add_any and ceil clamp clz complex conj div eq eq_to floor ge gt imag is_finite le le_to lt lt_to max min
    mul ne neg nextafter not or population_count real rem round select_n shift_left shift_right_arithmetic
    shift_right_logical sign square sub xor cummax cummin cumprod cumsum psum psum_invariant pmax pmin reduce_scatter
    approx_top_k
"""
_TRANSCENDENTAL = """
    acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1
    igamma igamma_grad_a igammac lgamma log log1p log2 logistic polygamma pow regularized_incomplete_beta rsqrt sin
    sinh sqrt tan tanh zeta
"""
_REDUCTIONS = "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"
_MOVES = """
    all_gather all_gather_invariant all_to_all broadcast_in_dim concatenate convert_element_type copy copy_p device_put
    empty empty2 iota pad pbroadcast ppermute ragged_all_to_all random_bits random_fold_in random_seed random_split
    random_unwrap random_wrap reduce_precision rev rng_bit_generator rng_uniform split stack threefry2x32 tile transpose
    unstack
"""
_FREE = """
    after_all axis_index bitcast_convert_type create_token expand_dims layout_constraint mesh_cast name num_programs
    optimization_barrier pcast program_id pvary reshape reshard sharding_constraint squeeze stop_gradient
"""


def leaf_counts(equation: Any) -> tuple[Counts, bool]:
    """Return the counts of an equation without a body, and whether its primitive has a model."""
    model = _MODELS.get(equation.primitive.name)
    return (Counts(bytes=moved_bytes(equation)), False) if model is None else (model(equation), True)


def _results(equation: Any) -> int:
    return sum(map(elements, equation.outvars))


def _elementwise(equation: Any) -> Counts:
    return Counts(other_flops=_results(equation), bytes=moved_bytes(equation))


def _transcendental(equation: Any) -> Counts:
    return Counts(transcendentals=_results(equation), bytes=moved_bytes(equation))


def _reduction(equation: Any) -> Counts:
    folds = sum(map(elements, equation.invars)) - _results(equation)
    return Counts(other_flops=folds, bytes=moved_bytes(equation))


def _move(equation: Any) -> Counts:
    return Counts(bytes=moved_bytes(equation))


def _free(_: Any) -> Counts:
    return Counts()


def _window(equation: Any) -> Counts:
    window = math.prod(equation.params["window_dimensions"])
    return Counts(other_flops=_results(equation) * (window - 1), bytes=moved_bytes(equation))


def _window_gradient(equation: Any) -> Counts:
    window = math.prod(equation.params["window_dimensions"])
    return Counts(other_flops=elements(equation.invars[0]) * window, bytes=moved_bytes(equation))


def _integer_pow(equation: Any) -> Counts:
    power = abs(equation.params["y"])
    products = max(0, power.bit_length() + power.bit_count() - 2) + (equation.params["y"] < 0)
    return Counts(other_flops=elements(equation.outvars[0]) * products, bytes=moved_bytes(equation))


def _sort(equation: Any) -> Counts:
    length = equation.invars[0].aval.shape[equation.params["dimension"]]
    compared = elements(equation.invars[0]) * equation.params["num_keys"]
    return Counts(other_flops=compared * math.ceil(math.log2(max(1, length))), bytes=moved_bytes(equation))


def _top_k(equation: Any) -> Counts:
    rounds = max(1, math.ceil(math.log2(max(1, equation.params["k"]))))
    return Counts(other_flops=elements(equation.invars[0]) * rounds, bytes=moved_bytes(equation))


def _slice(equation: Any) -> Counts:
    return Counts(bytes=2 * operand_bytes(equation.outvars) + operand_bytes(equation.invars[1:]))


def _update(equation: Any) -> Counts:
    return Counts(bytes=operand_bytes(equation.invars[1:]) + operand_bytes(equation.invars[1:2]))


def _scatter(equation: Any, *, combines: bool) -> Counts:
    _, indices, updates = equation.invars
    times = 3 if combines else 2
    moved = operand_bytes([indices]) + times * operand_bytes([updates])
    return Counts(other_flops=elements(updates) if combines else 0, bytes=moved)


def _reference(equation: Any) -> Counts:
    touched = operand_bytes(equation.outvars) or operand_bytes(equation.invars[1:2])
    return Counts(bytes=2 * touched)


def _add_to_reference(equation: Any) -> Counts:
    return Counts(other_flops=elements(equation.invars[1]), bytes=3 * operand_bytes(equation.invars[1:2]))


def _log_sum_exp(equation: Any) -> Counts:
    out = elements(equation.outvars[0])
    return Counts(other_flops=2 * out, transcendentals=2 * out, bytes=moved_bytes(equation))


def _factorisation(thirds: Callable[[int, int], int]) -> Callable[[Any], Counts]:
    def count(equation: Any) -> Counts:
        *batch, rows, columns = equation.invars[0].aval.shape
        flops = math.prod(batch) * thirds(max(rows, columns), min(rows, columns)) // 3
        return Counts(other_flops=flops, bytes=moved_bytes(equation))

    return count


def _triangular_solve(equation: Any) -> Counts:
    order = equation.invars[0].aval.shape[-1]
    return Counts(other_flops=order * elements(equation.invars[1]), bytes=moved_bytes(equation))


def _fft(equation: Any) -> Counts:
    lengths = equation.params["fft_lengths"]
    points = math.prod(lengths)
    batch = max(elements(equation.invars[0]), elements(equation.outvars[0])) // max(1, points)
    return Counts(other_flops=int(5 * batch * points * math.log2(max(1, points))), bytes=moved_bytes(equation))


_MODELS: dict[str, Callable[[Any], Counts]] = {
    **dict.fromkeys(_ARITHMETIC.split(), _elementwise),
    **dict.fromkeys(_TRANSCENDENTAL.split(), _transcendental),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_MOVES.split(), _move),
    **dict.fromkeys(_FREE.split(), _free),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum", "select_and_gather_add"), _window),
    "select_and_scatter_add": _window_gradient,
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "conv_general_dilated": convolution,
    "integer_pow": _integer_pow,
    "one_minus_square": lambda e: Counts(other_flops=2 * elements(e.outvars[0]), bytes=moved_bytes(e)),
    "sort": _sort,
    "top_k": _top_k,
    "slice": _slice,
    "dynamic_slice": _slice,
    "gather": _slice,
    "dynamic_update_slice": _update,
    "scatter": lambda e: _scatter(e, combines=False),
    "scatter-add": lambda e: _scatter(e, combines=True),
    "scatter-mul": lambda e: _scatter(e, combines=True),
    "scatter-min": lambda e: _scatter(e, combines=True),
    "scatter-max": lambda e: _scatter(e, combines=True),
    "get": _reference,
    "swap": _reference,
    "addupdate": _add_to_reference,
    "cumlogsumexp": _log_sum_exp,
    "cholesky": _factorisation(lambda _, n: n**3),
    "lu": _factorisation(lambda m, n: n * n * (3 * m - n)),
    "qr": _factorisation(lambda m, n: 2 * n * n * (3 * m - n)),
    "geqrf": _factorisation(lambda m, n: 2 * n * n * (3 * m - n)),
    "householder_product": _factorisation(lambda m, n: 2 * n * n * (3 * m - n)),
    "triangular_solve": _triangular_solve,
    "fft": _fft,
}
