"""Kit of `Loss`: every sum and weight adds up over rows, and a weight is a function of the batch alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols.batch import LMBatch, batch_size
from dovetail_protocols.loss import LossOutput, Term
from dovetail_protocols.testing._rules import close_to, difference, require

__all__ = ["check_loss"]

LossFunction = Callable[[Any, Any], LossOutput]


def check_loss(loss: LossFunction, params: Any, batch: Any, *, tolerance: float = 1e-5) -> None:
    """Check a loss on one batch.

    Args:
        loss: ``loss(params, batch) -> LossOutput``.
        params: a pytree of arrays.
        batch: at least two rows, best with different numbers of counted targets; an LMBatch is also tried with all
            its weights 0.
        tolerance: of sums and weights, relative to the largest value.

    Raises:
        ConformanceError: a rule is broken.
        ValueError: the batch has a single row.
    """
    rows = batch_size(batch)
    if rows < 2:
        raise ValueError(f"the batch has {rows} row; check_loss needs at least two, to add up over them")
    run = jax.jit(loss)
    whole = run(params, batch)
    _check_form(whole)
    terms = _terms(whole)
    require(float(whole.weight) > 0, "Loss: a batch with targets has a positive weight", weight=float(whole.weight))
    for cut in {1, rows // 2}:
        parts = [_terms(run(params, _rows(batch, part))) for part in (slice(0, cut), slice(cut, rows))]
        _check_sum(parts, terms, cut, tolerance)
    _check_pure(loss, params, batch, terms, tolerance)
    _check_weights(run, params, batch, terms)
    _check_gradients(loss, params, batch)
    if isinstance(batch, LMBatch):
        _check_masked(loss, params, batch)


def _check_form(out: Any) -> None:
    require(isinstance(out, LossOutput), "Loss: it returns a LossOutput", kind=type(out).__name__)
    for name, term in {"": (out.sum, out.weight), **out.aux}.items():
        rule = f"Loss: {f'aux {name!r}' if name else 'the result'} is a finite scalar sum and weight"
        require(len(term) == 2 and all(jnp.shape(x) == () for x in term), rule, shapes=[jnp.shape(x) for x in term])
        require(all(np.isfinite(x) for x in term), rule, values=[float(x) for x in term])


def _terms(out: LossOutput) -> dict[str, Term]:
    return {"": Term(out.sum, out.weight), **{name: Term(*term) for name, term in out.aux.items()}}


def _rows(batch: Any, part: slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[part], batch)


def _check_sum(parts: list[dict[str, Term]], whole: dict[str, Term], cut: int, tolerance: float) -> None:
    for name, term in whole.items():
        known = all(name in part for part in parts)
        require(known, "Loss: every batch has the same aux names", name=name, names=[sorted(part) for part in parts])
        for kind in ("sum", "weight"):
            values = [float(getattr(part[name], kind)) for part in parts]
            expected = float(getattr(term, kind))
            good = close_to(sum(values), expected, tolerance) is None
            rule = "Loss: sums and weights are additive over rows (not means, not divided beforehand)"
            require(good, rule, term=name or "main", kind=kind, cut=cut, parts=values, whole=expected)


def _check_pure(loss: LossFunction, params: Any, batch: Any, terms: dict[str, Term], tolerance: float) -> None:
    first, second = _terms(loss(params, batch)), _terms(loss(params, batch))
    diff = difference(second, first)
    require(diff is None, "Loss: the same arguments give the same result", diff=diff)
    for name, term in terms.items():
        error = close_to(jnp.stack(jax.tree.leaves(first[name])), jnp.stack(jax.tree.leaves(term)), tolerance)
        require(error is None, "Loss: it gives under jit what it gives without", term=name or "main", error=error)


def _check_weights(run: LossFunction, params: Any, batch: Any, terms: dict[str, Term]) -> None:
    rng = np.random.default_rng(0)

    def moved(leaf: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        noise = jnp.asarray(rng.standard_normal(jnp.shape(leaf)), jnp.float32)
        return (leaf.astype(jnp.float32) * jnp.float32(1.5) + noise).astype(leaf.dtype)

    other = _terms(run(jax.tree.map(moved, params), batch))
    for name, term in terms.items():
        same = float(other[name].weight) == float(term.weight)
        rule = "Loss: a weight is a function of the batch alone, never of the parameters"
        require(same, rule, term=name or "main", weight=float(term.weight), other=float(other[name].weight))


def _objective(loss: LossFunction, params: Any, batch: Any) -> jax.Array:
    out = loss(params, batch)
    extra = [term[0] for name, term in out.aux.items() if name.startswith("loss/")]
    return sum((value.astype(jnp.float32) for value in extra), out.sum.astype(jnp.float32))


def _check_gradients(loss: LossFunction, params: Any, batch: Any) -> None:
    gradients = jax.jit(jax.grad(lambda p: _objective(loss, p, batch), allow_int=True))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        if leaf.dtype == jax.dtypes.float0:
            continue
        finite = bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32))))
        require(finite, "Loss: the gradients are finite", leaf=jax.tree_util.keystr(path))


def _check_masked(loss: LossFunction, params: Any, batch: LMBatch) -> None:
    empty = batch._replace(loss_weights=jnp.zeros_like(batch.loss_weights))
    out = loss(params, empty)
    nothing = float(out.sum) == 0 and float(out.weight) == 0
    rule = "Loss: targets of weight 0 add nothing to sum and weight"
    require(nothing, rule, sum=float(out.sum), weight=float(out.weight))
    _check_gradients(loss, params, empty)
