"""The loader: the plan's batches, whatever prefetches, saves and shares them."""

import json
import threading
import time

import grain
import numpy as np
import pytest
from data_toys import Arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_data import Plan, loader
from dovetail_protocols.testing import check_host_split, check_loader, check_loader_follows_plan

OPTIONS = {"seq_len": 6, "batch": 24}


@pytest.fixture
def made(source):
    return Plan(source, **OPTIONS, seed=0)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("dovetail-data")]


@pytest.fixture(autouse=True)
def threads_at_once(monkeypatch):
    """Even batches that are made in no time are made one by one, ahead, by threads."""
    monkeypatch.setattr(loader, "_WORTH_A_THREAD", 0.0)
    monkeypatch.setattr(loader, "_MOST_STEPS", 1)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
def test_prefetch_never_changes_the_data(made, prefetch):
    """Settings for speed must not decide what is learned (defect 2 of the peers)."""
    iterator = iter(made.loader(start_step=3, prefetch=prefetch))
    for step, batch in enumerate(take(iterator, 6), 3):
        np.testing.assert_equal(batch, made.at(step))
    iterator.close()


def test_the_conformance_kit_accepts_it(source, made):
    """Whatever the trainer and the checkpointer rely on, with threads running ahead."""
    other = Plan(source, **OPTIONS, seed=1)
    for prefetch in (0, 3):
        check_loader(lambda p=prefetch: iter(made.loader(prefetch=p)), make_other=lambda: iter(other.loader()))
    check_loader_follows_plan(lambda: iter(made.loader()), made)


@pytest.mark.parametrize("counts", [(1, 2, 3, 4, 6, 8, 24)])
def test_the_union_over_processes_is_the_plans_batch(made, counts):
    """Another number of processes must train on the same data."""
    check_host_split(lambda i, n: iter(made.loader(process_index=i, process_count=n, prefetch=0)), made, counts=counts)


def test_a_state_of_four_processes_continues_on_any_number(made):
    """Elastic restart (defect 4): the state is the same for every process and says nothing of their number."""
    states = []
    for index in range(4):
        iterator = iter(made.loader(process_index=index, process_count=4))
        take(iterator, 5)
        states.append(json.loads(json.dumps(iterator.get_state())))
        iterator.close()
    assert all(state == states[0] for state in states)
    for count in (1, 2, 3, 8):
        parts = []
        for index in range(count):
            iterator = iter(made.loader(process_index=index, process_count=count, prefetch=0))
            iterator.set_state(states[0])
            parts.append(next(iterator))
        for name in ("tokens", "targets", "loss_weights", "positions", "segment_ids"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(made.at(5), name))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["next", "save", "restore"]), st.integers(0, 5)), max_size=25))
def test_any_sequence_of_saves_and_restores_continues_the_same_stream(actions):
    """A model of the loader: one number."""
    made = Plan(Arrays([5, 3, 8, 1]), seq_len=3, batch=2, seed=0)
    iterator, step, saved = iter(made.loader(prefetch=2)), 0, [(0, {"step": 0, "fingerprint": made.fingerprint})]
    for action, index in actions:
        if action == "next":
            np.testing.assert_equal(next(iterator), made.at(step))
            step += 1
        elif action == "save":
            saved.append((step, iterator.get_state()))
        else:
            step, state = saved[index % len(saved)]
            iterator.set_state(state)
        assert iterator.get_state()["step"] == step
    iterator.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_grains_own_checkpoint_assertion_passes(source, prefetch):
    """The peer's definition of a checkpointable dataset."""
    finite = Plan(source, seq_len=6, batch=4, seed=0, epochs=1)
    grain.experimental.assert_equal_output_after_checkpoint(finite.loader(prefetch=prefetch))


def test_it_composes_with_grain(made):
    """Users' transformations go on working, and their iterators carry our state."""
    doubled = made.loader().map(lambda batch: batch.tokens * 2)
    iterator = iter(doubled)
    assert isinstance(made.loader(), grain.IterDataset)
    assert isinstance(iter(made.loader()), grain.DatasetIterator)
    for step in range(3):
        np.testing.assert_array_equal(next(iterator), made.at(step).tokens * 2)
    state = iterator.get_state()
    again = iter(doubled)
    again.set_state(state)
    np.testing.assert_array_equal(next(again), made.at(3).tokens * 2)
    limited = grain.experimental.LimitIterDataset(made.loader(), count=2)
    assert len(list(limited)) == 2
    iterator.close()
    again.close()


def test_a_finite_plan_ends_and_stays_ended(source):
    """Prefetch must not run past the end."""
    finite = Plan(source, seq_len=6, batch=4, seed=0, epochs=1)
    iterator = iter(finite.loader(prefetch=4))
    assert len(list(iterator)) == finite.steps
    with pytest.raises(StopIteration):
        next(iterator)
    state = iterator.get_state()
    assert state["step"] == finite.steps
    other = iter(finite.loader())
    other.set_state(state)
    assert list(other) == []
    assert list(finite.loader(start_step=finite.steps)) == []


@pytest.mark.parametrize("end", ["close", "error", "garbage"])
def test_no_thread_is_left_behind(source, made, end):
    """Leaked threads keep caches open and end in hangs (defect 10)."""
    before = len(our_threads())
    iterator = iter(made.loader(prefetch=3))
    next(iterator)
    assert len(our_threads()) > before
    if end == "error":
        with pytest.raises(ValueError, match="another plan"):
            iterator.set_state({"step": 0, "fingerprint": Plan(source, **OPTIONS, seed=9).fingerprint})
    if end == "garbage":
        del iterator
    else:
        iterator.close()
        iterator.close()
        with pytest.raises(ValueError, match="is closed"):
            next(iterator)
    deadline = time.monotonic() + 10
    while len(our_threads()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_while_reading_reaches_the_consumer_and_can_be_retried():
    """A storage hiccup in a prefetching thread must neither vanish nor shift the data."""

    class Flaky(Arrays):
        fails = 0

        def gather(self, documents, starts, stops):
            if self.fails and threading.current_thread().name.startswith("dovetail-data"):
                Flaky.fails -= 1
                raise OSError("storage is away")
            return super().gather(documents, starts, stops)

    made = Plan(Flaky([50, 60]), seq_len=4, batch=2, seed=0)
    iterator = iter(made.loader(prefetch=1))
    next(iterator)
    Flaky.fails = 4
    raised = 0
    step = 1
    while step < 8:
        try:
            batch = next(iterator)
        except OSError:
            raised += 1
            continue
        np.testing.assert_equal(batch, made.at(step))
        step += 1
    assert raised
    iterator.close()


class Slow(Arrays):
    """Storage that takes as long as it is told to."""

    seconds = 0.0

    def gather(self, documents, starts, stops):
        time.sleep(self.seconds * len(documents))
        return super().gather(documents, starts, stops)


def test_threads_are_for_batches_that_take_long(monkeypatch):
    """Handing over what is made in 0.2 ms takes twice the processor time; threads are for waiting for storage."""
    monkeypatch.undo()
    source = Slow([50, 60])
    made = Plan(source, seq_len=4, batch=2, seed=0)
    monkeypatch.setattr(loader, "_WORTH_A_THREAD", 10.0)  # no machine is so slow
    iterator = iter(made.loader(prefetch=2))
    take(iterator, 20)
    assert not iterator._ahead
    monkeypatch.undo()
    monkeypatch.setattr(loader, "_MOST_STEPS", 1)
    source.seconds = 0.005
    while iterator._ready:  # the rest of a group
        next(iterator)
    next(iterator)
    assert len(iterator._ahead) == 2
    step = iterator.get_state()["step"]
    source.seconds = 0.0
    monkeypatch.setattr(loader, "_WORTH_A_THREAD", 10.0)
    for later, batch in enumerate(take(iterator, 30), step):
        np.testing.assert_equal(batch, made.at(later))
    assert not iterator._ahead
    iterator.close()


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_groups_never_change_the_data(source, monkeypatch, tokens):
    """Batches that are made together, across skips, growing batches and the end, are those of one by one."""
    monkeypatch.setattr(loader, "_GROUP_TOKENS", tokens)
    monkeypatch.setattr(loader, "_MOST_STEPS", 6)
    made = Plan(source, seq_len=5, batch=[(0, 2), (7, 4)], seed=0, epochs=2, skip=[(3, 5), (11, 12)])
    parts = [list(made.loader(process_index=index, process_count=2, prefetch=0)) for index in range(2)]
    assert len(parts[0]) == len(parts[1]) == made.steps
    for step, pair in enumerate(zip(*parts, strict=True)):
        whole = [np.concatenate(arrays) for arrays in zip(*(part[:5] for part in pair), strict=True)]
        for array, expected in zip(whole, made.at(step)[:5], strict=True):
            np.testing.assert_array_equal(array, expected)


def test_what_fails_later_does_not_fail_now(monkeypatch):
    """A damaged file stops the run at the step that reads it, not at the first of a group."""

    class Damaged(Arrays):
        def gather(self, documents, starts, stops):
            if 3 in documents:
                raise OSError("document 3 cannot be read")
            return super().gather(documents, starts, stops)

    monkeypatch.undo()
    made = Plan(Damaged([9] * 8), seq_len=8, batch=1, seed=0, epochs=1)
    bad = next(step for step in range(made.steps) if any(p.document == 3 for p in made.explain(step).rows[0]))
    iterator = iter(made.loader(prefetch=0))
    for step in range(bad):
        np.testing.assert_equal(next(iterator), made.at(step))
    with pytest.raises(OSError, match="document 3"):
        next(iterator)
    assert iterator.get_state()["step"] == bad


def test_prefetch_starts_early_when_asked(made):
    """Grain's start_prefetch hides the first batches behind the restoring of the model."""
    iterator = iter(made.loader(prefetch=2))
    iterator.start_prefetch()
    iterator.start_prefetch()
    assert our_threads()
    assert iterator.get_state()["step"] == 0
    np.testing.assert_equal(next(iterator), made.at(0))
    iterator.close()


DIFFERENT = [
    ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"seq_len": 7}, "seq_len is 6 there and 7 here"),
    ({"batch": 12}, "batch is 24 there and 12 here"),
    ({"positions": "continue"}, "positions is restart there and continue here"),
    ({"across_documents": True}, "across_documents is False there and True here"),
]


@pytest.mark.parametrize(("change", "message"), DIFFERENT)
def test_a_state_of_another_plan_is_refused_and_the_difference_named(source, made, change, message):
    """A silently different stream is the worst outcome of a restart."""
    state = iter(made.loader()).get_state()
    other = Plan(source, **({**OPTIONS, "seed": 0} | change))
    with pytest.raises(ValueError, match=message):
        iter(other.loader()).set_state(state)


def test_a_state_of_other_data_is_refused(source, made):
    """The corpus changed by a byte: the same step is other text."""
    state = iter(made.loader()).get_state()
    other = Plan(Arrays(source.lengths, "changed"), **OPTIONS, seed=0)
    with pytest.raises(ValueError, match="data is arrays there and changed here"):
        iter(other.loader()).set_state(state)


def test_skip_ranges_can_be_added_after_a_save_but_not_before_it(source):
    """Saved at step 10, spike at step 12: leave 11 to 14 out and go on. What lies before must be as it was."""
    plans = {text: Plan(source, **OPTIONS, seed=0, skip=text) for text in (((2, 4),), ((2, 4), (12, 15)), ((5, 7),))}
    first, later, other = plans.values()
    iterator = iter(first.loader(prefetch=0, start_step=10))
    state = iterator.get_state()
    again = iter(later.loader(prefetch=0))
    again.set_state(state)
    np.testing.assert_equal(next(again), Plan(source, **OPTIONS, seed=0).at(15))
    with pytest.raises(ValueError, match="left out the steps 2-4 and this plan leaves out 5-7"):
        iter(other.loader()).set_state(state)
    state = {**state, "step": 11}
    with pytest.raises(ValueError, match="ranges that begin before step 13 must be the same"):
        iter(later.loader()).set_state(state)


@pytest.mark.parametrize("state", [None, {}, {"step": 1}, {"step": 1, "fingerprint": "x"}, {"position": 1}])
def test_what_is_no_state_is_refused(made, state, untyped):
    """States come from files, also of other tools."""
    with pytest.raises(ValueError, match=r"expected|another plan"):
        iter(made.loader()).set_state(state)


@pytest.mark.parametrize("step", [-1, 1.5, "1", None])
def test_a_state_with_a_wrong_step_is_refused(made, step):
    """A position is a whole number."""
    state = iter(made.loader()).get_state() | {"step": step}
    with pytest.raises(ValueError, match="expected"):
        iter(made.loader()).set_state(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_count": 5}, "process_count=5; expected a divisor of the batch of 24 rows"),
        ({"process_count": 0}, "process_count=0"),
        ({"process_count": 2, "process_index": 2}, "process_index=2; expected 0 to 1"),
        ({"process_index": -1}, "process_index=-1"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_wrong_options_are_refused(made, options, message):
    """An uneven share would drop rows."""
    with pytest.raises(ValueError, match=message):
        made.loader(**options)
