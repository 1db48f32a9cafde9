"""The loader: a plan's batches as a Grain dataset whose state is a step."""

import operator
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grain

from dovetail_data.planning import Plan
from dovetail_data.resuming import differences

if TYPE_CHECKING:
    import dovetail_protocols

__all__ = ["PlanDataset", "PlanIterator"]

_MOST_THREADS = 2  # one batch takes milliseconds; more threads would only compete with the computation


class PlanDataset(grain.IterDataset[Any]):
    """The batches of a plan from a step on; made by `Plan.loader`.

    Attributes:
        plan: the plan.
        start_step: the first step.
        process_index: which of the processes this is.
        process_count: how many processes share a batch.
        ahead: batches that threads make ahead.
    """

    def __init__(
        self, plan: Plan, *, start_step: int = 0, process_index: int = 0, process_count: int = 1, prefetch: int = 2
    ) -> None:
        super().__init__()
        self.plan = plan
        self.start_step = _position("start_step", start_step, plan)
        self.process_index = operator.index(process_index)
        self.process_count = operator.index(process_count)
        self.ahead = operator.index(prefetch)
        if self.process_count < 1 or any(rows % self.process_count for _, rows in plan.schedule.stages):
            raise ValueError(f"process_count={process_count}; expected a divisor of the batch of {plan.schedule} rows")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index={process_index}; expected 0 to {self.process_count - 1}")
        if self.ahead < 0:
            raise ValueError(f"prefetch={prefetch}; expected 0 or more")

    def rows_at(self, step: int) -> "dovetail_protocols.LMBatch":
        """Return this process's rows of a step."""
        share = self.plan.batch_at(step) // self.process_count
        return self.plan.rows_at(step, self.process_index * share, (self.process_index + 1) * share)

    def __iter__(self) -> "PlanIterator":
        return PlanIterator(self)

    def __str__(self) -> str:
        return f"PlanDataset({self.plan.fingerprint})"


class PlanIterator(grain.DatasetIterator[Any]):
    """Iterates over a `PlanDataset`. Its state is the consumer's step, whatever threads have made ahead."""

    def __init__(self, dataset: PlanDataset) -> None:
        super().__init__()
        self._dataset = dataset
        self._step = dataset.start_step
        self._ahead: deque[Future[Any]] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._open = True

    def __next__(self) -> "dovetail_protocols.LMBatch":
        self._check_open()
        steps = self._dataset.plan.steps
        if steps is not None and self._step >= steps:
            raise StopIteration
        batch = self._next_ahead() if self._dataset.ahead else self._dataset.rows_at(self._step)
        self._step += 1
        return batch

    def start_prefetch(self) -> None:
        """Let threads begin with the next batches; calling it again does no harm."""
        self._check_open()
        dataset = self._dataset
        last = self._step + dataset.ahead + 1
        if dataset.plan.steps is not None:
            last = min(last, dataset.plan.steps)
        for step in range(self._step + len(self._ahead), last if dataset.ahead else 0):
            if self._threads is None:
                count = min(dataset.ahead, _MOST_THREADS)
                self._threads = ThreadPoolExecutor(count, thread_name_prefix="dovetail-data")
            self._ahead.append(self._threads.submit(dataset.rows_at, step))

    def get_state(self) -> dict[str, Any]:
        """Return ``{"step": the next step, "fingerprint": the plan's}``, the same for every process."""
        return {"step": self._step, "fingerprint": self._dataset.plan.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a saved step, also one that another number of processes saved.

        A plan may have skip ranges that the saved one had not, as long as they begin at or after the saved position.

        Raises:
            ValueError: the state belongs to another plan; the message names what differs.
        """
        self._check_open()
        step = checked_step(state, self._dataset.plan)
        self._forget()
        self._step = step

    def close(self) -> None:
        """Stop the threads and wait for them; calling it again does no harm."""
        if self._open:
            self._open = False
            self._forget()
            if self._threads is not None:
                self._threads.shutdown(wait=True)
        super().close()

    def __str__(self) -> str:
        return f"PlanIterator(step={self._step})"

    def _next_ahead(self) -> "dovetail_protocols.LMBatch":
        self.start_prefetch()
        try:
            return self._ahead.popleft().result()
        except BaseException:
            self._forget()  # what is left in the queue no longer begins at this step
            raise

    def _forget(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"{self} is closed; make a new one with iter(plan.loader(...))")


def checked_step(state: Mapping[str, Any], plan: Plan) -> int:
    """Return the step that a state names.

    Raises:
        ValueError: it belongs to another plan, or is no state of a loader.
    """
    if not isinstance(state, Mapping) or set(state) != {"step", "fingerprint"}:
        raise ValueError(f"the loader state is {state!r:.200}; expected {{'step': ..., 'fingerprint': ...}}")
    step = _position("step", state["step"], plan)
    if found := differences(str(state["fingerprint"]), plan, step):
        raise ValueError(f"the loader state belongs to another plan: {'; '.join(found)}")
    return step


def _position(name: str, step: Any, plan: Plan) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise ValueError(f"{name}={step!r}; expected a whole number") from None
    if number < 0 or (plan.steps is not None and number > plan.steps):
        raise ValueError(f"{name}={number}; expected {'0 or more' if plan.steps is None else f'0 to {plan.steps}'}")
    return number
