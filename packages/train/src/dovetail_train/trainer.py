"""Trainer: a jitted, donated step over a state, usable step by step or through `fit`."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dovetail_profile import cost
from dovetail_protocols import Checkpointer, Loader, LossOutput, Sink
from dovetail_runtime import Rules, put_batch, shardings_like, use
from dovetail_train.explain import Explanation, explain
from dovetail_train.hooks import Checkpoint, End, Hook
from dovetail_train.step import TrainState, init_state, make_step, patterns_of
from dovetail_train.throughput import Throughput

__all__ = ["NonFiniteLossError", "Trainer"]

logger = logging.getLogger("dovetail_train")


class NonFiniteLossError(FloatingPointError):
    """The loss of a step is NaN or infinite."""


class Trainer:
    """Trains any parameters with any loss and any optimizer.

    The state is donated to each step: `state` is always the present one, and arrays of an earlier state are gone.

    Args:
        params: a pytree of arrays; copied, so that the caller's stay valid.
        loss: see `dovetail_train.make_step`.
        optimizer: an optax transformation.
        accumulate: micro-batches per step.
        trained: patterns of the parameters that are trained, see `dovetail_train.make_step`.
        key: a typed random key, when the loss takes one.
        mesh: where batches and parameters live; None for one device.
        rules: how logical axes map to the mesh (`dovetail_runtime.Rules`); needed with a mesh.
        shardings: a tree like `params` of their shardings; default replicated over the mesh.

    Raises:
        ValueError: `mesh` without `rules`, or `trained` has no patterns.
        PatternError: a pattern matches no parameter.
        TypeError: what is trained are not all floats.
    """

    def __init__(
        self,
        params: Any,
        loss: Callable[..., LossOutput],
        optimizer: optax.GradientTransformation,
        *,
        accumulate: int = 1,
        trained: str | Iterable[str] = "**",
        key: jax.Array | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: Rules | None = None,
        shardings: Any = None,
    ) -> None:
        if mesh is not None and rules is None:
            raise ValueError("mesh without rules; pass for example dovetail_runtime.DATA as rules")
        self._mesh, self._rules = mesh, rules
        trained = patterns_of(trained)
        step = make_step(loss, optimizer, accumulate=accumulate, trained=trained)
        begin = functools.partial(init_state, optimizer=optimizer, trained=trained)
        self._shardings = self._state_shardings(params, begin, key, shardings)
        outputs = None if self._shardings is None else (self._shardings, None)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        start = jax.jit(lambda p, k: begin(_copy(p), key=_copy(k)), out_shardings=self._shardings)
        self.state: TrainState = start(params, key)

    def _state_shardings(self, params: Any, begin: Callable[..., TrainState], key: Any, shardings: Any) -> Any:
        if self._mesh is None:
            return None
        if shardings is None:
            replicated = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
            shardings = jax.tree.map(lambda _: replicated, params)
        state = jax.eval_shape(lambda p, k: begin(p, key=k), params, key)
        return shardings_like(state, params, shardings)

    @property
    def params(self) -> Any:
        """The present parameters; valid until the next step."""
        return self.state.params

    def put(self, batch: Any) -> Any:
        """Move this process's part of a batch to the devices."""
        if self._mesh is None or self._rules is None:
            return batch
        return put_batch(batch, self._mesh, self._rules)

    def step(self, batch: Any) -> Mapping[str, jax.Array]:
        """Take one step; the returned metrics are device scalars (reading one waits for the step)."""
        with self.scope():
            self.state, metrics = self._step(self.state, self.put(batch))
        return metrics

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which `dovetail_runtime.constrain` inside a model follows the mesh and the rules."""
        if self._mesh is None or self._rules is None:
            return contextlib.nullcontext()
        return use(self._mesh, self._rules)

    def explain(self, batch: Any) -> Explanation:
        """Compile the step for a batch and say what it holds and costs; takes no step."""
        with self.scope():
            return explain(self._step, self.state, self.put(batch))

    def flops(self, batch: Any) -> int:
        """Return the floating-point operations in the matrix products of a step over all devices; compiles nothing."""
        with self.scope():
            return cost(self._step, self.state, self.put(batch)).matmul_flops

    def restore(self, checkpointer: Checkpointer, *, data: Loader | None = None, step: int | None = None) -> int:
        """Put the state (and the loader) back to a saved step, by default the latest; return the step."""
        like = self.state
        if self._shardings is not None:
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.state, self._shardings
            )
        restored = checkpointer.restore(like, data=data, step=step)
        self.state = restored.state
        return restored.step

    def fit(
        self,
        loader: Iterator[Any],
        steps: int,
        *,
        hooks: Sequence[Hook] = (),
        sinks: Sequence[Sink] = (),
        throughput: Throughput | None = None,
        scalars: Mapping[str, Callable[[int], Any]] | None = None,
        stop: Callable[[int], bool] | None = None,
    ) -> int:
        """Train until step `steps` (counted from the first step ever, so a resumed run ends where it should).

        One step runs while the host prepares the next; before a hook, all is finished.

        Args:
            loader: yields batches.
            steps: the last step.
            hooks: called in order after the steps they ask for; a `Checkpoint` comes last, because what follows it
                would be lost to a resumed run that was killed in between.
            sinks: receive metrics and timings of every step.
            throughput: turns seconds into rates.
            scalars: deterministic functions of the step to report, such as a learning-rate schedule.
            stop: asked after every step; True ends fit early (for example `dovetail_runtime.preemption`'s flag).

        Returns:
            The step at which fit ended.

        Raises:
            NonFiniteLossError: the loss of a step is NaN or infinite; nothing was saved after it.
            ValueError: a hook follows a Checkpoint, or the state is past `steps` already.
            RuntimeError: the loader ended before `steps`.
        """
        self._check(hooks, steps)
        log = _Log(sinks, throughput or Throughput(), scalars or {})
        step = int(self.state.step)
        while step < steps:
            batch = next(loader, None)
            if batch is None:
                raise RuntimeError(f"the loader ended at step {step}; {steps} steps were asked for")
            metrics = self.step(batch)
            step += 1
            stopped = stop is not None and stop(step)
            end: End = "planned" if step == steps else "stopped" if stopped else None
            due = [hook for hook in hooks if hook.due(step, end)]
            log.put(step, metrics, flush=bool(due) or end is not None)
            for hook in due:
                with self.scope():
                    values = hook(self, step, log.latest)
                log.values(step, values)
                log.restart()
            if end is not None:
                break
        return step

    def _check(self, hooks: Sequence[Hook], steps: int) -> None:
        if any(isinstance(hook, Checkpoint) for hook in hooks[:-1]):
            raise ValueError(f"hooks {[type(h).__name__ for h in hooks]}; put Checkpoint last")
        if int(self.state.step) > steps:
            raise ValueError(f"the state is at step {int(self.state.step)}, past steps={steps}")


def _copy(tree: Any) -> Any:
    """Copy arrays (jit hands back an input that it only passes through, which donation would then delete)."""
    return jax.tree.map(jnp.copy, tree)


class _Log:
    """Writes the numbers of a step when the next one is on its way."""

    def __init__(
        self, sinks: Sequence[Sink], throughput: Throughput, scalars: Mapping[str, Callable[[int], Any]]
    ) -> None:
        self._sinks, self._throughput, self._scalars = sinks, throughput, scalars
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self.latest: dict[str, float] = {}  # what has been written of the last step
        self.restart()

    def restart(self) -> None:
        """Begin to measure anew: what happened since the last step belongs to no step."""
        self._since = time.perf_counter()

    def put(self, step: int, metrics: Mapping[str, jax.Array], *, flush: bool) -> None:
        self._finish()
        self._pending = (step, metrics)
        if flush:
            self._finish()

    def _finish(self) -> None:
        if self._pending is None:
            return
        step, arrays = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(arrays)).items()}  # waits for the step
        now = time.perf_counter()
        timings = self._throughput.rates(now - self._since)
        self._since = now
        values |= {name: float(function(step)) for name, function in self._scalars.items()}
        self.latest = {}
        self.values(step, values)
        for sink in self._sinks:
            sink.timings(step, timings)
        if not math.isfinite(values["loss"]):
            raise NonFiniteLossError(f"the loss is {values['loss']} at step {step}; metrics: {values}")

    def values(self, step: int, values: Mapping[str, float]) -> None:
        self.latest |= values
        for sink in self._sinks:
            if values:
                sink.metrics(step, values)
