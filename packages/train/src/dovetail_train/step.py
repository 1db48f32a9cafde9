"""The training step as a pure function of state and batch.

A loss returns sums and weights that add up over rows (`dovetail_protocols.Loss`). The step first adds the weights of
the whole batch, then scales each micro-batch's sums by them: the gradients of n micro-batches add up in one buffer to
exactly the gradient of the whole batch, whatever the masks.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from dovetail_protocols import LossOutput, batch_size, paths

__all__ = ["Metrics", "StepFunction", "TrainState", "init_state", "make_step"]

Metrics: TypeAlias = Mapping[str, jax.Array]
OBJECTIVE = "loss/"
ALL = "**"


class TrainState(NamedTuple):
    """Everything that a step changes, a pytree of arrays.

    Attributes:
        step: int32 scalar, how many steps have been taken.
        params: the parameters.
        opt_state: the optimizer's state, of the parameters that are trained.
        key: a typed random key that never changes (each step derives its own from it), or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array | None


StepFunction: TypeAlias = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array | None = None,
    *,
    trained: str | Iterable[str] = ALL,
) -> TrainState:
    """Return the state before the first step; for `trained` and what is raised see `make_step`."""
    part = _part(params, patterns_of(trained))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(part), key)


def make_step(
    loss: Callable[..., LossOutput],
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    trained: str | Iterable[str] = ALL,
) -> StepFunction:
    """Return ``step(state, batch) -> (state, metrics)``, to be jitted with the state donated.

    The metrics are ``loss`` (sum / weight), ``weight``, ``grad_norm`` (before the optimizer) and the mean of every
    auxiliary term under its name. A term named ``loss/...`` is part of the objective.

    Args:
        loss: ``loss(params, batch)``, or ``loss(params, batch, key)`` when the state has a random key; it then gets
            one that depends on (key, step, micro-batch) alone.
        optimizer: an optax transformation.
        accumulate: how many micro-batches a batch is split into; must divide its rows.
        trained: patterns of the parameters that are trained, see `dovetail_protocols.paths.select`. The optimizer sees
            no others (None is in their places), no gradient of theirs is made, and they stay bit by bit what they are;
            so they may be quantized.

    Raises:
        ValueError: `accumulate` is below 1, or `trained` has no patterns; from the step: `accumulate` does not divide
            the rows of the batch.
        PatternError: from the step: a pattern matches no parameter.
        TypeError: from the step: what is trained are not all floats.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}; expected at least 1")
    patterns = patterns_of(trained)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        part, whole = _part(state.params, patterns), state.params

        def of_part(part: Any, *arguments: Any) -> LossOutput:
            return loss(paths.update(whole, paths.flatten(part)), *arguments)

        state = state._replace(params=part)
        if accumulate == 1:
            gradients, output = _gradients(of_part, state, batch, _keys(state, 1)[0], None)
        else:
            gradients, output = _accumulated(of_part, state, batch, accumulate)
        updates, opt_state = optimizer.update(gradients, state.opt_state, part)
        params = paths.update(whole, paths.flatten(optax.apply_updates(part, updates)))
        metrics = {"loss": output.sum / output.weight, "weight": output.weight}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        metrics |= {name: term.sum / term.weight for name, term in output.aux.items()}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def patterns_of(trained: str | Iterable[str]) -> tuple[str, ...]:
    """Return patterns that can be read more than once.

    Raises:
        ValueError: there are none.
    """
    patterns = (trained,) if isinstance(trained, str) else tuple(trained)
    if not patterns:
        raise ValueError(f"trained={patterns} has no patterns; expected at least one, such as {ALL!r} for everything")
    return patterns


def _part(params: Any, patterns: tuple[str, ...]) -> Any:
    """Return the parameters that are trained; the others are None, which is no leaf."""
    chosen = set(paths.select(params, patterns))

    def kept(path: Any, leaf: Any) -> Any:
        address = paths.path_of(path)
        if address not in chosen:
            return None
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"{address} has dtype {dtype}, which has no gradient; expected trained= patterns without it, "
                "such as dovetail_models.LORA for the adapters alone"
            )
        return leaf

    return jax.tree_util.tree_map_with_path(kept, params)


def _keys(state: TrainState, count: int) -> Any:
    if state.key is None:
        return [None] * count
    return jax.random.split(jax.random.fold_in(state.key, state.step), count)


def _call(loss: Callable[..., LossOutput], params: Any, batch: Any, key: Any) -> LossOutput:
    return loss(params, batch) if key is None else loss(params, batch, key)


def _gradients(loss: Callable[..., LossOutput], state: TrainState, batch: Any, key: Any, weights: Any) -> Any:
    """Return the gradient of the objective and the loss output; `weights` are the step's, default the batch's own."""

    def objective(params: Any) -> tuple[jax.Array, LossOutput]:
        output = _call(loss, params, batch, key)
        main, aux = _weights(output) if weights is None else weights
        total = output.sum / _nonzero(main)
        for name, term in output.aux.items():
            if name.startswith(OBJECTIVE):
                total = total + term.sum / _nonzero(aux[name])
        return total, output

    return jax.grad(objective, has_aux=True)(state.params)


def _weights(output: LossOutput) -> Any:
    return jax.lax.stop_gradient((output.weight, {name: term.weight for name, term in output.aux.items()}))


def _nonzero(weight: jax.Array) -> jax.Array:
    """A batch without any target has gradient 0, not NaN."""
    return jnp.where(weight == 0, jnp.ones_like(weight), weight)


def _accumulated(loss: Callable[..., LossOutput], state: TrainState, batch: Any, count: int) -> Any:
    rows = batch_size(batch)
    if rows % count:
        raise ValueError(f"accumulate={count} does not divide the {rows} rows of the batch")
    # Every count-th row: each device of a sharded batch keeps its own rows.
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(rows // count, count, *x.shape[1:]), 0, 1), batch)
    keys = _keys(state, count)
    # Weights depend on the batch alone, so the compiler drops the rest of this forward.
    weights = _weights(_call(loss, state.params, batch, keys[0]))

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
        part, key = inputs
        return jax.tree.map(jnp.add, carry, _gradients(loss, state, part, key, weights)), None

    inputs = (micro, keys if state.key is not None else None)
    first = jax.tree.map(lambda x: x[0], inputs)
    shapes = jax.eval_shape(lambda i: _gradients(loss, state, i[0], i[1], weights), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, inputs)[0]
