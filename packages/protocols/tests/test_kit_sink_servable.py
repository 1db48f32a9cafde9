"""The kits of sinks and servables accept good ones and reject each named broken one."""

import itertools

import numpy as np
import pytest

from dovetail_protocols import Servable, TensorSpec
from dovetail_protocols.testing import ConformanceError, check_servable, check_sink


class GoodSink:
    rows = ()

    def __init__(self):
        self.kept = {"metrics": [], "timings": []}
        GoodSink.rows = {"metrics": [], "timings": []}

    def metrics(self, step, values):
        self.kept["metrics"].append((step, dict(values)))

    def timings(self, step, values):
        self.kept["timings"].append((step, dict(values)))

    def close(self):
        GoodSink.rows = self.kept


class MixesTimingsIn(GoodSink):
    def timings(self, step, values):
        super().timings(step, values)
        super().metrics(step, values)


class Rounds(GoodSink):
    def metrics(self, step, values):
        super().metrics(step, {name: float(f"{value:.6g}") for name, value in values.items()})


class Float32(GoodSink):
    def metrics(self, step, values):
        super().metrics(step, {name: float(np.float32(value)) for name, value in values.items()})


class NeverWrites(GoodSink):
    def close(self):
        pass


class DropsTheLastRow(GoodSink):
    def close(self):
        self.kept["metrics"].pop()
        super().close()


class KeepsOneRowPerStep(GoodSink):
    def close(self):
        self.kept["metrics"] = list(dict(self.kept["metrics"]).items())
        super().close()


class LatestFirst(GoodSink):
    def close(self):
        self.kept["timings"].reverse()
        super().close()


def sink(kind):
    check_sink(kind, lambda: GoodSink.rows["metrics"], lambda: GoodSink.rows["timings"])


def test_a_good_sink_passes():
    sink(GoodSink)


@pytest.mark.parametrize(
    "mutant",
    [MixesTimingsIn, Rounds, Float32, NeverWrites, DropsTheLastRow, KeepsOneRowPerStep, LatestFirst],
    ids=lambda kind: kind.__name__,
)
def test_broken_sinks_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="Sink: "):
        sink(mutant)


class GoodServable:
    inputs = {"x": TensorSpec("float32", ("batch", 3)), "n": TensorSpec("int32", ("batch",))}  # noqa: RUF012
    outputs = {"sum": TensorSpec("float32", ("batch",)), "size": TensorSpec("int64", ())}  # noqa: RUF012

    def __call__(self, inputs):
        self.check(inputs)
        return self.run(**inputs)

    def check(self, inputs):
        for name in inputs.keys() ^ self.inputs.keys():
            raise ValueError(f"input {name!r} is missing or unknown; expected {list(self.inputs)}")
        axes = {}
        for name, spec in self.inputs.items():
            spec.bind(name, inputs[name], axes)

    def run(self, x, n):
        return {"sum": x.sum(1) + n.astype(np.float32), "size": np.int64(len(x))}


class IgnoresUnknownInputs(GoodServable):
    def __call__(self, inputs):
        return super().__call__({name: value for name, value in inputs.items() if name in self.inputs})


class CastsItsInputs(GoodServable):
    def check(self, inputs):
        specs = self.inputs
        known = {k: np.asarray(v).astype(specs[k].dtype) if k in specs else v for k, v in inputs.items()}
        super().check(known)


class FillsMissingInputs(GoodServable):
    def __call__(self, inputs):
        return super().__call__({"x": np.zeros((1, 3), np.float32), **inputs})


class BroadcastsBatches(GoodServable):
    def check(self, inputs):
        if set(inputs) == set(self.inputs):
            for name, spec in self.inputs.items():
                spec.bind(name, inputs[name], {})

    def run(self, x, n):
        return {"sum": x.sum(1) + np.resize(n, len(x)).astype(np.float32), "size": np.int64(len(x))}


class WrongOutputDtype(GoodServable):
    def run(self, x, n):
        return {**super().run(x, n), "sum": x.sum(1).astype(np.float64)}


class PaddedOutput(GoodServable):
    def run(self, x, n):
        return {**super().run(x, n), "sum": np.zeros(8, np.float32)}


class ExtraOutput(GoodServable):
    def run(self, x, n):
        return {**super().run(x, n), "debug": x}


class ChangesItsInputs(GoodServable):
    def run(self, x, n):
        x *= np.float32(2)
        return super().run(x, n)


class RandomOutput(GoodServable):
    counter = itertools.count()

    def run(self, x, n):
        return {**super().run(x, n), "size": np.int64(next(self.counter))}


class CrashesWithKeyError(GoodServable):
    def check(self, inputs):
        return {name: inputs[name] for name in self.inputs}


SERVABLES = [
    IgnoresUnknownInputs,
    CastsItsInputs,
    FillsMissingInputs,
    BroadcastsBatches,
    WrongOutputDtype,
    PaddedOutput,
    ExtraOutput,
    ChangesItsInputs,
    RandomOutput,
    CrashesWithKeyError,
]


def test_a_good_servable_passes():
    assert isinstance(GoodServable(), Servable)
    check_servable(GoodServable())
    make = lambda size: {"x": np.ones((size, 3), np.float32), "n": np.arange(size, dtype=np.int32)}  # noqa: E731
    check_servable(GoodServable(), sizes=(2, 5), make_inputs=make)


@pytest.mark.parametrize("mutant", SERVABLES, ids=lambda kind: kind.__name__)
def test_broken_servables_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="Servable: "):
        check_servable(mutant())
