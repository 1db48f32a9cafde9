"""The trainer: exact resumption, meshes, hooks, numbers."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_toys import Batches, batch_of, quadratic, regression, tiny

from dovetail_protocols import Restored
from dovetail_runtime import DATA, current, mesh
from dovetail_train import (
    Checkpoint,
    Evaluate,
    JsonLines,
    NonFiniteLossError,
    Throughput,
    Trainer,
    evaluate,
    next_token,
)


@pytest.fixture(autouse=True)
def _promotion():
    """optax mixes int32 counts with floats; our own code is tested strictly in test_step."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Memory:
    """A checkpointer in memory."""

    def __init__(self):
        self.saved = {}
        self.metrics = {}

    def save(self, step, state, *, data=None, meta=None, metrics=None):
        assert step not in self.saved
        self.metrics[step] = dict(metrics)
        self.saved[step] = (jax.device_get(state._replace(key=None)), data.get_state() if data else None, meta or {})

    def restore(self, like=None, *, data=None, step=None):
        step = max(self.saved) if step is None else step
        state, position, meta = self.saved[step]
        if data is not None:
            data.set_state(position)
        return Restored(step, jax.tree.map(jnp.asarray, state), meta)

    def steps(self):
        return sorted(self.saved)

    def wait(self): ...

    def close(self): ...


def trainer(**options):
    definition, params = tiny()
    return Trainer(params, next_token(definition), optax.adamw(1e-2), **options)


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    """Breaks when anything that a step depends on is missing from the checkpoint, or metrics repeat or get lost."""
    whole = trainer()
    with JsonLines(tmp_path / "whole") as sink:
        whole.fit(Batches(), 10, sinks=[sink])

    store, loader, first = Memory(), Batches(), trainer()
    with JsonLines(tmp_path / "parts") as sink:
        save = Checkpoint(store, 3, loader)
        assert first.fit(loader, 10, sinks=[sink], hooks=[save], stop=lambda step: step == 7) == 7
    second, loader = trainer(), Batches()
    step = second.restore(store, data=loader, step=6)
    with JsonLines(tmp_path / "parts", resume=step) as sink:
        second.fit(loader, 10, sinks=[sink], hooks=[Checkpoint(store, 100, loader)])
    equal(whole.state, second.state)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert store.steps() == [3, 6, 7, 10]


def test_step_and_fit_agree_and_the_callers_params_survive():
    """Breaks when donation deletes arrays of the caller."""
    definition, params = tiny()
    by_hand = Trainer(params, next_token(definition), optax.adamw(1e-2))
    for k in range(3):
        by_hand.step(batch_of(k))
    fitted = trainer()
    fitted.fit(Batches(), 3)
    equal(by_hand.state, fitted.state)
    assert all(not x.is_deleted() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_mesh_gives_the_numbers_of_one_device(axes):
    """Breaks when rows or gradients are lost or counted twice over devices."""
    one, many = trainer(), trainer(mesh=mesh(**axes), rules=DATA, accumulate=1)
    one.fit(Batches(), 3)
    many.fit(Batches(), 3)
    for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_constraints_of_the_model_follow_the_mesh():
    """Breaks when activations are left to the compiler although the rules place them."""
    seen = []

    def loss(params, batch):
        seen.append(current())
        return quadratic(params, batch)

    batch, params = regression(rows=16)
    grid = mesh(data=8)
    Trainer(params, loss, optax.sgd(0.1), mesh=grid, rules=DATA).step(batch)
    assert seen[-1] is not None
    assert seen[-1].mesh == grid
    Trainer(params, loss, optax.sgd(0.1)).step(batch)
    assert seen[-1] is None


def test_mesh_without_rules_is_refused():
    with pytest.raises(ValueError, match="mesh without rules"):
        trainer(mesh=mesh(data=8))


def test_timings_are_wall_times(tmp_path):
    """Breaks when dispatch is timed instead of execution: the sum of the steps must be the time that passed."""
    subject = trainer()
    subject.step(batch_of(0))
    with JsonLines(tmp_path) as sink:
        started = time.perf_counter()
        subject.fit(Batches(), 41, sinks=[sink], throughput=Throughput(tokens=48, flops=10, peak=1000.0))
        passed = time.perf_counter() - started
    rows = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert sum(r["step_seconds"] for r in rows) == pytest.approx(passed, rel=0.2, abs=0.05)
    for r in rows:
        assert r["tokens_per_second"] == pytest.approx(48 / r["step_seconds"])
        assert r["mfu"] == pytest.approx(0.01 / r["step_seconds"])


def test_scalars_and_evaluation_join_the_metrics(tmp_path):
    """Breaks when evaluation runs on other parameters than those of its step, or its mean is not sum over weight."""
    definition, _ = tiny()
    loss = jax.jit(next_token(definition))
    batches = [batch_of(100), batch_of(101, rows=3)]
    hook = Evaluate(loss, lambda: batches, every=2, derive=lambda m: {"double": 2 * m["loss"]})
    subject = trainer()
    with JsonLines(tmp_path) as sink:
        subject.fit(Batches(), 3, sinks=[sink], hooks=[hook], scalars={"rate": lambda step: step / 10})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["rate"] for r in rows if "rate" in r] == [0.1, 0.2, 0.3]
    valid = {r["step"]: r for r in rows if "valid/loss" in r}
    assert list(valid) == [2, 3]
    outputs = [loss(subject.params, b) for b in batches]
    mean = sum(float(o.sum) for o in outputs) / sum(float(o.weight) for o in outputs)
    assert valid[3]["valid/loss"] == pytest.approx(mean, rel=1e-6)
    assert valid[3]["valid/double"] == 2 * valid[3]["valid/loss"]


def test_a_save_knows_the_metrics_of_its_step():
    """A policy that keeps the best steps sees another step's numbers, or none."""
    seen, store, subject = {}, Memory(), trainer()

    class Sink:
        def metrics(self, step, values):
            seen.setdefault(step, {}).update(values)

        def timings(self, step, values): ...

        def close(self): ...

    definition, _ = tiny()
    evaluation = Evaluate(jax.jit(next_token(definition)), lambda: [batch_of(100)], 2)
    subject.fit(Batches(), 6, sinks=[Sink()], hooks=[evaluation, Checkpoint(store, 3)])
    assert store.metrics == {3: seen[3], 6: seen[6]}
    assert "valid/loss" in store.metrics[6]
    assert "valid/loss" not in store.metrics[3]


def test_stopping_does_not_add_an_evaluation(tmp_path):
    """Breaks the byte-identity of a resumed run's metrics."""
    definition, _ = tiny()
    hook = Evaluate(jax.jit(next_token(definition)), lambda: [batch_of(9)], every=4)
    with JsonLines(tmp_path) as sink:
        trainer().fit(Batches(), 4, sinks=[sink], hooks=[hook], stop=lambda step: step == 2)
    assert "valid" not in (tmp_path / "metrics.jsonl").read_text()


def test_non_finite_loss_stops_before_anything_is_saved():
    """Breaks when a run goes on and overwrites its good checkpoints with NaN."""
    batch, params = regression()
    bad = batch | {"y": np.full(12, np.nan, np.float32)}
    store = Memory()
    subject = Trainer(params, quadratic, optax.sgd(0.1))
    with pytest.raises(NonFiniteLossError, match="step 2"):
        subject.fit(iter([batch, bad, batch, batch]), 4, hooks=[Checkpoint(store, 2)])
    assert store.steps() == []


def test_misuse_is_refused():
    """A checkpoint before another hook, too few batches, a state past the end, bad intervals, empty evaluations."""
    definition, params = tiny()
    store = Memory()
    evaluation = Evaluate(next_token(definition), list, 1)
    with pytest.raises(ValueError, match="put Checkpoint last"):
        trainer().fit(Batches(), 1, hooks=[Checkpoint(store, 1), evaluation])
    with pytest.raises(RuntimeError, match="ended at step 2; 5 steps"):
        trainer().fit(Batches(end=2), 5)
    done = trainer()
    done.step(batch_of(0))
    done.step(batch_of(1))
    with pytest.raises(ValueError, match="step 2, past steps=1"):
        done.fit(Batches(), 1)
    with pytest.raises(ValueError, match="every=0"):
        Checkpoint(store, 0)
    with pytest.raises(ValueError, match="every=0"):
        Evaluate(next_token(definition), list, 0)
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(next_token(definition), params, [])


def test_explain_counts_parameters_flops_and_memory():
    """Breaks when the printed cost is not that of the step."""
    subject = trainer()
    report = subject.explain(batch_of(0))
    sizes = [x.size for x in jax.tree.leaves(subject.params)]
    assert report.parameters == sum(sizes) == 2 * 17 * 8
    assert report.parameter_bytes == 4 * sum(sizes)
    assert report.optimizer_bytes == 8 * sum(sizes) + 4
    assert report.flops > 6 * 8 * 6 * 17 * 8
    assert report.temporary_bytes > 0
    assert "272 parameters" in str(report)
    assert int(subject.state.step) == 0
