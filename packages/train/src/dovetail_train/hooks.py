"""What happens between two steps: saving and evaluating."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax

from dovetail_protocols import Checkpointer, Loader, LossOutput

if TYPE_CHECKING:
    from dovetail_train.trainer import Trainer

__all__ = ["Checkpoint", "End", "Evaluate", "Hook", "evaluate"]

End: TypeAlias = Literal["planned", "stopped"] | None
"""Whether fit ends after a step: at the planned step, because it was told to stop, or not yet."""


@runtime_checkable
class Hook(Protocol):
    """Called by `Trainer.fit` after the steps that it asks for."""

    def due(self, step: int, end: End) -> bool:
        """Tell whether to be called after `step`; `end` says whether and why fit ends there."""
        ...

    def __call__(self, trainer: "Trainer", step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Do it, with the trainer's state exactly that after `step`.

        `metrics` are those of the step, what earlier hooks returned included; returned values join them.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Saves every `every` steps and where fit ends, with the metrics of the step for policies such as the best.

    Attributes:
        checkpointer: meets `dovetail_protocols.Checkpointer`.
        every: steps between two saves.
        data: the loader whose position goes into the same step.
        meta: a JSON value saved with every step.
    """

    checkpointer: Checkpointer
    every: int
    data: Loader | None = None
    meta: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}; expected at least 1 step")

    def due(self, step: int, end: End) -> bool:
        """Every `every` steps and where fit ends, also when it was stopped early."""
        return step % self.every == 0 or end is not None

    def __call__(self, trainer: "Trainer", step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Begin an asynchronous save, unless the step is saved already (a run that resumed at its last step)."""
        if step not in self.checkpointer.steps():
            self.checkpointer.save(step, trainer.state, data=self.data, meta=self.meta, metrics=metrics)
        return {}


def evaluate(
    loss: Callable[[Any, Any], LossOutput],
    params: Any,
    batches: Iterable[Any],
    *,
    put: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """Return the means of a loss and its auxiliary terms over batches: all sums divided by all weights.

    Args:
        loss: jitted by the caller if it is called often.
        params: parameters.
        batches: any number of batches, at least one.
        put: moves a host batch to the devices.

    Raises:
        ValueError: no batches, or their total weight is 0.
    """
    total: Any = None
    for batch in batches:
        output = loss(params, batch if put is None else put(batch))
        sums = {"loss": (output.sum, output.weight), **{k: tuple(v) for k, v in output.aux.items()}}
        values = jax.tree.map(float, jax.device_get(sums))
        total = values if total is None else jax.tree.map(float.__add__, total, values)
    if total is None or not total["loss"][1]:
        raise ValueError(f"evaluation needs at least one batch with a positive weight; got totals {total}")
    return {name: s / w for name, (s, w) in total.items() if w}


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluates every `every` steps and at the planned end.

    Attributes:
        loss: ``loss(params, batch) -> LossOutput``, jitted.
        batches: called for the batches of each evaluation, always the same ones.
        every: steps between two evaluations.
        prefix: of the reported names.
        derive: computes further values from the means, for example bits per byte.
    """

    loss: Callable[[Any, Any], LossOutput]
    batches: Callable[[], Iterable[Any]]
    every: int
    prefix: str = "valid/"
    derive: Callable[[dict[str, float]], dict[str, float]] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}; expected at least 1 step")

    def due(self, step: int, end: End) -> bool:
        """Every `every` steps and at the planned end; not where a run is stopped, which must not change its metrics."""
        return step % self.every == 0 or end == "planned"

    def __call__(self, trainer: "Trainer", step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Evaluate the trainer's parameters."""
        del step, metrics
        means = evaluate(self.loss, trainer.state.params, self.batches(), put=trainer.put)
        means |= self.derive(means) if self.derive else {}
        return {f"{self.prefix}{name}": value for name, value in means.items()}
