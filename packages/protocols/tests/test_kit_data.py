"""The kits of loaders and plans accept a good one and reject each named broken one."""

import copy

import numpy as np
import pytest

from dovetail_protocols.testing import (
    ConformanceError,
    check_host_split,
    check_loader,
    check_loader_follows_plan,
    check_plan,
)


class GoodPlan:
    def __init__(self, seed=0, steps=20):
        self.seed, self.steps = seed, steps

    @property
    def fingerprint(self):
        return f"toy-{self.seed}-{self.steps}"

    def __len__(self):
        return self.steps

    def at(self, step):
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rng = np.random.default_rng((self.seed, step))
        return {"tokens": rng.integers(0, 100, (4, 3)), "weights": rng.random((4, 1)).astype(np.float32)}


class GoodLoader:
    def __init__(self, plan=None, host=0, hosts=1):
        self.plan, self.step, self.host, self.hosts = plan or GoodPlan(), 0, host, hosts

    def __iter__(self):
        return self

    def __next__(self):
        try:
            batch = self.plan.at(self.step)
        except IndexError:
            raise StopIteration from None
        self.step += 1
        size = 4 // self.hosts
        return {name: leaf[self.host * size : (self.host + 1) * size] for name, leaf in batch.items()}

    def get_state(self):
        return {"step": self.step, "data": self.plan.fingerprint}

    def set_state(self, state):
        if state["data"] != self.plan.fingerprint:
            raise ValueError(f"the state is of {state['data']}, the loader of {self.plan.fingerprint}")
        self.step = state["step"]


class StateOfThePrefetcher(GoodLoader):
    def get_state(self):
        return {**super().get_state(), "step": self.step + 2}


class ResumesOneLate(GoodLoader):
    def set_state(self, state):
        super().set_state({**state, "step": state["step"] + 1})


class ResumesOneEarly(GoodLoader):
    def set_state(self, state):
        super().set_state({**state, "step": max(0, state["step"] - 1)})


class SharesMutableState(GoodLoader):
    position = [0]  # noqa: RUF012 - the fault

    def __next__(self):
        self.step = self.position[0]
        batch = super().__next__()
        self.position[0] = self.step
        return batch


class StateNotJson(GoodLoader):
    def get_state(self):
        return {**super().get_state(), "step": np.int64(self.step)}


class StateWithTuple(GoodLoader):
    def get_state(self):
        return {**super().get_state(), "shards": (1, 2)}


class StateIsAView(GoodLoader):
    def __init__(self, *args):
        super().__init__(*args)
        self.live = super().get_state()

    def __next__(self):
        batch = super().__next__()
        self.live["step"] = self.step
        return batch

    def get_state(self):
        return self.live

    def set_state(self, state):
        super().set_state(state)
        self.live = dict(state)


class KeepsTheGivenState(StateIsAView):
    def get_state(self):
        return copy.deepcopy(self.live)

    def set_state(self, state):
        GoodLoader.set_state(self, state)
        self.live = state


class GetStateAdvances(GoodLoader):
    def get_state(self):
        state = super().get_state()
        next(self)
        return state


class CannotRewind(GoodLoader):
    def set_state(self, state):
        super().set_state({**state, "step": max(self.step, state["step"])})


class ReusesItsBuffer(GoodLoader):
    def __init__(self, *args):
        super().__init__(*args)
        self.buffer = None

    def __next__(self):
        batch = super().__next__()
        self.buffer = self.buffer or batch
        for name, leaf in batch.items():
            self.buffer[name][...] = leaf
        return self.buffer


class NewIteratorEachTime(GoodLoader):
    def __iter__(self):
        return GoodLoader(self.plan)


class ShuffledEachTime(GoodLoader):
    def __init__(self, *args):
        super().__init__(GoodPlan(seed=int(np.random.default_rng().integers(1 << 30))))


class TakesForeignStates(GoodLoader):
    def set_state(self, state):
        self.step = state["step"]


class RaggedLeaves(GoodLoader):
    def __next__(self):
        return {**super().__next__(), "scalar": np.float32(1)}


LOADERS = [
    StateOfThePrefetcher,
    ResumesOneLate,
    ResumesOneEarly,
    SharesMutableState,
    StateNotJson,
    StateWithTuple,
    StateIsAView,
    KeepsTheGivenState,
    GetStateAdvances,
    CannotRewind,
    ReusesItsBuffer,
    NewIteratorEachTime,
    ShuffledEachTime,
    TakesForeignStates,
    RaggedLeaves,
]


def check(kind):
    check_loader(kind, make_other=lambda: GoodLoader(GoodPlan(seed=1)), settle=0)


def test_a_good_loader_passes():
    check(GoodLoader)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_short_finite_loader_passes(steps):
    check_loader(lambda: GoodLoader(GoodPlan(steps=steps)), settle=0)


@pytest.mark.parametrize("mutant", LOADERS, ids=lambda kind: kind.__name__)
def test_broken_loaders_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="Loader: "):
        check(mutant)


def test_the_message_tells_how_far_off_a_resumed_loader_is():
    with pytest.raises(ConformanceError, match="batch 0 was due, it gave batch 2"):
        check(StateOfThePrefetcher)


def test_data_without_differences_is_refused():
    class Constant(GoodLoader):
        def __next__(self):
            return np.zeros(3)

    with pytest.raises(ValueError, match="first batches are all equal"):
        check(Constant)


class CountsItsReads(GoodPlan):
    reads = 0

    def at(self, step):
        self.reads += 1
        return super().at(step + self.reads - 1)


class CarriesAGenerator(GoodPlan):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def at(self, step):
        super().at(step)
        return self.rng.integers(0, 100, (4, 3))


class HandsOutItsCache(GoodPlan):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def at(self, step):
        return self.cache.setdefault(step, super().at(step))


class TakesNegativeSteps(GoodPlan):
    def at(self, step):
        return super().at(step % self.steps)


class GoesPastItsEnd(GoodPlan):
    def at(self, step):
        return super().at(step % self.steps if step >= 0 else step)


class ReturnsJaxArrays(GoodPlan):
    def at(self, step):
        import jax.numpy as jnp

        return jnp.asarray(super().at(step)["weights"])


class FingerprintChanges(GoodPlan):
    reads = 0

    @property
    def fingerprint(self):
        self.reads += 1
        return f"{self.reads}"


class FingerprintIgnoresTheSeed(GoodPlan):
    @property
    def fingerprint(self):
        return "toy"


PLANS = [
    CountsItsReads,
    CarriesAGenerator,
    HandsOutItsCache,
    TakesNegativeSteps,
    GoesPastItsEnd,
    ReturnsJaxArrays,
    FingerprintChanges,
    FingerprintIgnoresTheSeed,
]


def test_a_good_plan_passes():
    check_plan(GoodPlan(), twin=GoodPlan(), other=GoodPlan(seed=1))


@pytest.mark.parametrize("mutant", PLANS, ids=lambda kind: kind.__name__)
def test_broken_plans_are_rejected(mutant):
    other = mutant(seed=1) if mutant is FingerprintIgnoresTheSeed else None
    with pytest.raises(ConformanceError, match="Plan: "):
        check_plan(mutant(), other=other)


def test_a_twin_that_disagrees_is_rejected():
    with pytest.raises(ConformanceError, match="same fingerprint"):
        check_plan(GoodPlan(), twin=GoodPlan(seed=1))


class RowsInterleaved(GoodLoader):
    def __next__(self):
        batch = GoodLoader.__next__(GoodLoader(self.plan)) if self.step == 0 else self.plan.at(self.step)
        self.step += 1
        return {name: leaf[self.host :: self.hosts] for name, leaf in batch.items()}


class EveryHostTheWholeBatch(GoodLoader):
    def __init__(self, plan, host, hosts):
        super().__init__(plan)


def test_loaders_follow_their_plan():
    check_loader_follows_plan(GoodLoader, GoodPlan())
    with pytest.raises(ConformanceError, match="hosts=1, step=0"):
        check_loader_follows_plan(GoodLoader, GoodPlan(seed=1))


def test_hosts_split_the_global_batch():
    check_host_split(lambda host, hosts: GoodLoader(GoodPlan(), host, hosts), GoodPlan(), counts=(1, 2, 4))


@pytest.mark.parametrize("mutant", [RowsInterleaved, EveryHostTheWholeBatch], ids=lambda kind: kind.__name__)
def test_broken_splits_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="hosts=2"):
        check_host_split(lambda host, hosts: mutant(GoodPlan(), host, hosts), GoodPlan())
