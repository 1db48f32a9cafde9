"""The manager's promises: values at call time, atomic steps, errors that surface, deletion, data positions."""

import logging
import math
import os
import resource
import threading
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_workers import Counter, expected

from dovetail_checkpoint import Manager, Policy, all_steps, best, every, latest
from dovetail_protocols import Checkpointer


def files_in(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def test_meets_the_contract(tmp_path):
    """A trainer takes a checkpointer by contract only."""
    with Manager(tmp_path) as manager:
        assert isinstance(manager, Checkpointer)
        assert manager.latest_step() is None
        assert manager.steps() == []


def test_save_and_restore_with_data_and_meta(tmp_path):
    """One step holds the state, the data position and the metadata, all of the time of the call."""
    loader, meta = Counter(5), {"a": [1, None, "é"], "b": {"c": 0.1}}
    with Manager(tmp_path) as manager:
        manager.save(3, expected(3), data=loader, meta=meta, metrics={"loss": jnp.float32(0.5)})
        next(loader)
        meta["a"].append(2)
        assert manager.restore(data=(other := Counter())).step == 3
    assert other.position == 5
    step, state, restored_meta = Manager(tmp_path).restore(expected(0))
    assert (step, restored_meta) == (3, {"a": [1, None, "é"], "b": {"c": 0.1}})
    np.testing.assert_array_equal(state["w"], expected(3)["w"])
    assert state["n"]["step"] == 3
    assert type(state["n"]["step"]) is int


def test_values_are_those_at_the_call_under_donation_and_mutation(tmp_path):
    """A train step donates its state and NumPy buffers are reused; the save must not see either."""
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    n = 1 << 20
    with Manager(tmp_path, keep=latest(1)) as manager:
        for step in range(4):
            state = {
                "one": jnp.full(n, step + 0.25),
                "split": jax.device_put(jnp.full(n, step + 0.5), jax.NamedSharding(mesh, jax.P("x"))),
                "copies": jax.device_put(jnp.full(n, step + 0.75), jax.NamedSharding(mesh, jax.P())),
            }
            host = np.full(n, float(step))
            jax.block_until_ready(state)
            manager.save(step, {**state, "host": host})
            host[:] = -1
            jax.block_until_ready(overwrite(overwrite(state)))
            del state
            manager.wait()
            restored = manager.restore().state
            for name, value in (("one", 0.25), ("split", 0.5), ("copies", 0.75), ("host", 0.0)):
                assert (restored[name] == step + value).all(), (step, name)


def test_a_donated_leaf_is_refused_by_name(tmp_path):
    """Orbax's own message for a deleted array names no leaf."""
    gone = jnp.ones(3)
    gone.delete()
    with Manager(tmp_path) as manager, pytest.raises(ValueError, match=r"'a/b' was donated or deleted"):
        manager.save(1, {"a": {"b": gone}})
    assert list(tmp_path.glob("*")) == []


def test_existing_steps_are_refused(tmp_path):
    """Overwriting a good step in place could lose it."""
    with Manager(tmp_path) as manager:
        manager.save(1, expected(1))
        with pytest.raises(ValueError, match="step=1 has been saved"):
            manager.save(1, expected(2))
        np.testing.assert_array_equal(manager.restore().state["w"], expected(1)["w"])


def test_the_directory_is_listed_anew_each_time(tmp_path):
    """A cached list would go on naming steps that are gone."""
    with Manager(tmp_path, keep=all_steps()) as manager:
        for step in (2, 10):
            manager.save(step, {"x": np.ones(1)})
        manager.wait()
        assert manager.steps() == [2, 10]
        os.rename(tmp_path / "10", tmp_path / "elsewhere")
        (tmp_path / "007").mkdir()
        (tmp_path / "12").write_text("a file")
        assert manager.steps() == [2]
        assert manager.latest_step() == 2


@pytest.mark.parametrize("stage", ["orbax", "manifest", "commit"])
def test_a_failure_in_the_background_surfaces_once_and_leaves_no_step(tmp_path, stage):
    """A full disk must not end as a step that is listed but cannot be read."""
    broken = [True]

    def fault(at):
        if at == stage and broken[0]:
            raise OSError(28, "No space left on device")

    manager = Manager(tmp_path, _fault=fault)
    manager.save(1, expected(1))
    with pytest.raises(OSError, match="No space left") as caught:
        manager.wait()
    assert "step 1, which is not committed" in caught.value.__notes__[0]
    assert manager.steps() == []
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    manager.wait()
    manager.save(2, expected(2))
    with pytest.raises(OSError, match="No space left"):
        manager.save(3, expected(3))
    broken[0] = False
    manager.save(3, expected(3))
    manager.close()
    assert manager.steps() == [3]


def test_a_write_that_fails_in_orbax_surfaces_in_one_line(tmp_path):
    """A real failure of the array store: files may not grow beyond 200 kB."""
    manager = Manager(tmp_path)
    manager.save(1, expected(1))
    manager.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        manager.save(2, {"x": np.ones(1 << 18)})
        with pytest.raises(OSError, match="arrays could not be written") as caught:
            manager.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(caught.value)) < 400
    assert manager.steps() == [1]
    assert not list(tmp_path.glob(".tmp-*"))
    manager.save(2, {"x": np.ones(1 << 18)})
    manager.close()
    assert manager.steps() == [1, 2]


def test_close_raises_what_the_last_save_raised(tmp_path):
    """A run that ends with a failed save must not look successful."""

    def fault(stage):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"), Manager(tmp_path, _fault=fault) as manager:
        manager.save(1, expected(1))
    with pytest.raises(RuntimeError, match="closed"):
        manager.save(2, expected(2))


def test_an_error_in_the_block_is_not_hidden_by_a_failed_save(tmp_path, caplog):
    """The first error is the cause; the save's goes to the log."""

    def fault(stage):
        raise OSError(5, "Input/output error")

    def work():
        with Manager(tmp_path, _fault=fault) as manager:
            manager.save(1, expected(1))
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        work()
    assert "Input/output error" in caplog.text


def test_a_failed_deletion_surfaces_and_keeps_the_new_step(tmp_path):
    """Deleting comes after the commit, so its failure loses nothing."""

    def fault(stage):
        if stage == "delete":
            raise PermissionError(13, "Permission denied")

    manager = Manager(tmp_path, keep=latest(1), _fault=fault)
    manager.save(1, expected(1))
    manager.save(2, expected(2))
    with pytest.raises(PermissionError):
        manager.close()
    assert manager.steps() == [1, 2]


def test_keep_policies_act_on_the_directory(tmp_path):
    """best() reads the metrics of steps that an earlier process saved."""
    keep = latest(1) | every(4) | best("loss", 1)
    losses = {1: 3.0, 2: 0.5, 3: math.nan, 4: 2.0, 5: 0.5, 6: 9.0}
    for half in ((1, 2, 3), (4, 5, 6)):
        with Manager(tmp_path, keep=keep) as manager:
            for step in half:
                manager.save(step, {"x": np.ones(1)}, metrics={"loss": losses[step]})
    assert manager.steps() == [4, 5, 6]


def test_the_newest_and_the_just_committed_step_always_stay(tmp_path):
    """Saving an earlier step after a rewind must not delete it at once, nor the newest."""

    class Nothing(Policy):
        def kept(self, history):
            return frozenset()

    with Manager(tmp_path, keep=Nothing()) as manager:
        for step in (5, 9, 7):
            manager.save(step, {"x": np.ones(1)})
        manager.wait()
        assert manager.steps() == [7, 9]


def test_a_step_with_an_unreadable_manifest_is_neither_counted_nor_deleted(tmp_path, caplog):
    """A bad step must not push a good one out."""
    with Manager(tmp_path, keep=latest(2)) as manager:
        manager.save(1, {"x": np.ones(1)})
        manager.save(2, {"x": np.ones(1)})
    (tmp_path / "2" / "manifest.json").write_text("{")
    with Manager(tmp_path, keep=latest(2)) as manager:
        manager.save(3, {"x": np.ones(1)})
    assert manager.steps() == [1, 2, 3]
    assert "step 2 is not counted" in caplog.text


def test_a_second_writer_in_the_same_directory_cannot_lose_a_step(tmp_path):
    """Two managers that save the same step: one wins, the other raises."""
    go = threading.Event()

    def fault(stage):
        if stage == "commit":
            assert go.wait(20)

    slow = Manager(tmp_path, _fault=fault)
    slow.save(1, expected(1))
    with Manager(tmp_path) as quick:
        quick.save(1, expected(2))
    go.set()
    with pytest.raises(FileExistsError):
        slow.close()
    np.testing.assert_array_equal(quick.restore().state["w"], expected(2)["w"])


def test_a_tiny_step_is_small_and_quick(tmp_path):
    """Per-step overhead bounds how often a small state can be saved: at most 24 files; 2 s is far above the 0.05 s."""
    with Manager(tmp_path) as manager:
        manager.save(0, {"x": jnp.ones(4)})
        manager.wait()
        times = []
        for step in range(1, 6):
            start = time.perf_counter()
            manager.save(step, {"x": jnp.ones(4)})
            manager.wait()
            times.append(time.perf_counter() - start)
    assert len(files_in(tmp_path / "5")) <= 24
    assert min(times) < 2
    size = sum(p.stat().st_size for p in files_in(tmp_path / "5"))
    assert size < 16_000


def test_memory_of_a_restore_is_bounded(tmp_path):
    """NumPy leaves are read once, not copied several times (tracemalloc sees NumPy's memory)."""
    state = {"a": np.ones(1 << 21), "b": np.ones(1 << 21)}
    with Manager(tmp_path) as manager:
        manager.save(1, state)
        manager.wait()
        tracemalloc.start()
        restored = manager.restore().state
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert restored["a"].nbytes == 1 << 24
    assert peak < 2.5 * (2 << 24)


class Odd:
    pass


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"step": -1}, ValueError, "step=-1"),
        ({"step": 1.5}, TypeError, "step=1.5"),
        ({"step": True}, TypeError, "step=True"),
        ({"step": "1"}, TypeError, "step='1'"),
        ({"state": {"a": ["x"]}}, TypeError, "'a/0' is a str"),
        ({"state": {"a": Odd()}}, TypeError, "'a' is a Odd"),
        ({"state": {"a": np.array(["x"])}}, TypeError, "'a' has dtype <U1"),
        ({"state": {"a": np.array([None])}}, TypeError, "'a' has dtype object"),
        ({"state": {"a": 1 << 64}}, ValueError, "'a' is 18446744073709551616"),
        ({"state": {"a": {0: 1, "0": 2}}}, ValueError, "keys"),
        ({"meta": [1]}, TypeError, "meta is a list"),
        ({"meta": {"a": {1: 2}}}, TypeError, "meta/a has the key 1"),
        ({"meta": {"a": math.nan}}, ValueError, "meta/a is nan"),
        ({"meta": {"a": np.ones(1)}}, TypeError, "meta/a is a ndarray"),
        ({"data": Counter(np.int64(3))}, TypeError, "position is a int64"),
        ({"data": 3}, AttributeError, "get_state"),
        ({"metrics": {"loss": "low"}}, TypeError, r"metrics\['loss'\]"),
    ],
)
def test_bad_input_to_save_is_refused_and_leaves_nothing(tmp_path, arguments, error, match):
    """Every refusal names the place; the directory stays as it was."""
    with Manager(tmp_path) as manager:
        with pytest.raises(error, match=match):
            manager.save(**({"step": 1, "state": {"x": np.ones(1)}} | arguments))
        assert manager.steps() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"verify": "some"}, {"on_corrupt": "ignore"}, {"keep": 3}, {"path": "gs://bucket/run"}]
)
def test_unknown_options_are_refused(tmp_path, options):
    """A misspelt option must not fall back to a default."""
    with pytest.raises(ValueError, match="expected"):
        Manager(**({"path": tmp_path} | options))


def test_a_file_in_the_place_of_the_directory(tmp_path):
    """Permission and path mistakes are found at the start, or at the save when they come later."""
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Manager(tmp_path / "file")
    manager = Manager(tmp_path / "late")
    (tmp_path / "late").write_text("")
    with pytest.raises(FileExistsError):
        manager.save(1, expected(1))
    manager.close()


def test_traced_values_are_refused(tmp_path):
    """Saving inside jit would store tracers."""
    with Manager(tmp_path) as manager, pytest.raises(TypeError, match="'x' is a traced value"):
        jax.jit(lambda x: manager.save(1, {"x": x}))(1.0)


def test_leftovers_of_killed_processes_go_at_the_next_start_only(tmp_path):
    """Work in progress of this process, or of a living one, must survive a second manager."""
    go = threading.Event()
    manager = Manager(tmp_path, _fault=lambda stage: stage == "commit" and go.wait(20))
    manager.save(1, expected(1))
    (tmp_path / ".tmp-9-dead00000000-1").mkdir()
    other = Manager(tmp_path)
    assert not (tmp_path / ".tmp-9-dead00000000-1").exists()
    assert other.steps() == []
    go.set()
    manager.close()
    assert other.steps() == [1]


def test_reading_makes_no_files(tmp_path):
    """An evaluation job may have no right to write."""
    manager = Manager(tmp_path / "absent")
    assert manager.steps() == []
    with pytest.raises(FileNotFoundError, match="no committed step"):
        manager.restore()
    manager.close()
    assert list(tmp_path.iterdir()) == []


def test_logging_has_one_logger():
    """Libraries add no handlers."""
    assert logging.getLogger("dovetail_checkpoint").handlers == []
