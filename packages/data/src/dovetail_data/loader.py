"""The loader: a plan's batches as a Grain dataset whose state is a step."""

import contextlib
import operator
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import grain

from dovetail_data.planning import Plan
from dovetail_data.resuming import differences

if TYPE_CHECKING:
    import dovetail_protocols

__all__ = ["PlanDataset", "PlanIterator"]

_MOST_THREADS = 2  # more would only compete with the computation
_GROUP_TOKENS, _MOST_STEPS = 1 << 16, 32  # small batches are made together, which takes less time than one by one
_WORTH_A_THREAD = 2e-3  # seconds: a batch that is made faster costs less than handing it over


class _Made(NamedTuple):
    """Batches of consecutive steps, and how long it took to make them."""

    batches: list[Any]
    seconds: float


class PlanDataset(grain.IterDataset[Any]):
    """The batches of a plan from a step on; made by `Plan.loader`.

    Attributes:
        plan: the plan.
        start_step: the first step.
        process_index: which of the processes this is.
        process_count: how many processes share a batch.
        ahead: batches that threads make ahead, where one takes longer to make than to hand over.
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
        return self.plan.rows_at(step, *self._share(step))

    def group_at(self, step: int) -> "list[dovetail_protocols.LMBatch]":
        """Return this process's rows of a step and of some that follow; of the step alone where one of them fails."""
        tokens = self.plan.batch_at(step) // self.process_count * self.plan.seq_len
        stop = step + min(max(_GROUP_TOKENS // tokens, 1), _MOST_STEPS)
        steps = range(step, stop if self.plan.steps is None else min(stop, self.plan.steps))
        if len(steps) > 1:
            with contextlib.suppress(Exception):  # whoever asks for that step will see it
                return self.plan.rows_of([(each, *self._share(each)) for each in steps])
        return [self.rows_at(step)]

    def _share(self, step: int) -> tuple[int, int]:
        share = self.plan.batch_at(step) // self.process_count
        return self.process_index * share, (self.process_index + 1) * share

    def __iter__(self) -> "PlanIterator":
        return PlanIterator(self)

    def __str__(self) -> str:
        return f"PlanDataset({self.plan.fingerprint})"


class PlanIterator(grain.DatasetIterator[Any]):
    """Iterates over a `PlanDataset`. Its state is the consumer's step, whatever has been made ahead.

    Threads make batches ahead only as long as one takes longer to make than to hand over.
    """

    def __init__(self, dataset: PlanDataset) -> None:
        super().__init__()
        self._dataset = dataset
        self._step = dataset.start_step
        self._ready: deque[Any] = deque()  # the batches from this step on
        self._ahead: deque[Future[_Made]] = deque()  # those that follow
        self._threads: ThreadPoolExecutor | None = None
        self._open = True

    def __next__(self) -> "dovetail_protocols.LMBatch":
        self._check_open()
        steps = self._dataset.plan.steps
        if steps is not None and self._step >= steps:
            raise StopIteration
        slow = not self._ready and self._make_ready()
        batch = self._ready.popleft()
        self._step += 1
        if slow:
            self.start_prefetch()
        return batch

    def start_prefetch(self) -> None:
        """Let threads begin with the next batches; calling it again does no harm."""
        self._check_open()
        plan, ahead = self._dataset.plan, self._dataset.ahead
        step = self._step + len(self._ready) + len(self._ahead)
        last = self._step + ahead
        for each in range(step, last if plan.steps is None else min(last, plan.steps)):
            if self._threads is None:
                self._threads = ThreadPoolExecutor(min(ahead, _MOST_THREADS), thread_name_prefix="dovetail-data")
            self._ahead.append(self._threads.submit(self._timed, lambda step: [self._dataset.rows_at(step)], each))

    def _make_ready(self) -> bool:
        """Bring the next batches, and tell whether one takes long to make."""
        try:
            made = self._ahead.popleft().result() if self._ahead else self._timed(self._dataset.group_at, self._step)
        except BaseException:
            self._forget()  # what is left in the queue no longer begins at this step
            raise
        self._ready.extend(made.batches)
        return made.seconds >= _WORTH_A_THREAD * len(made.batches)

    @staticmethod
    def _timed(make: Callable[[int], list[Any]], step: int) -> "_Made":
        started = time.perf_counter()
        batches = make(step)
        return _Made(batches, time.perf_counter() - started)

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

    def _forget(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._ready.clear()

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
