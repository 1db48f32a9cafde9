"""The scheduler alone: pages, order, budgets, turns; simulated with arrivals, cancellations and short pools."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_engine.pages import TRASH, PagePool, pages_for
from dovetail_engine.scheduler import Chunk, Plan, Scheduler, Sequence


def scheduler(pages=64, page_size=4, max_running=4, chunk_tokens=16, chunks=4, decode_steps=4):
    return Scheduler(
        PagePool(pages + 1),
        page_size=page_size,
        max_running=max_running,
        chunk_tokens=chunk_tokens,
        chunks=chunks,
        decode_steps=decode_steps,
    )


def sequence(prompt, reply):
    return Sequence(list(range(prompt)), prompt + reply)


def check_pages(subject):
    """Every page belongs to one sequence or to nobody, and every cached token has a place."""
    held = [page for s in subject.running for page in s.pages]
    assert len(set(held)) == len(held)
    assert TRASH not in held
    assert len(held) + subject.pool.free == subject.pool.count - 1
    assert all(len(s.pages) * subject.page_size >= s.computed for s in subject.running)
    assert all(not s.pages and not s.computed and not s.slot for s in subject.waiting)
    slots = [s.slot for s in subject.running]
    assert len(set(slots)) == len(slots) == subject.max_running - subject.slots.free
    assert all(slots)


def check_plan(subject, plan):
    rows = plan.sequences
    assert len({id(row) for row in rows}) == len(rows) <= len(subject.running)
    assert len(subject.running) <= subject.max_running
    assert len(plan.prefill) <= subject.chunks
    assert sum(chunk.stop - chunk.start for chunk in plan.prefill) <= subject.chunk_tokens
    assert all(chunk.start == 0 for chunk in plan.prefill[1:]), "only the first chunk may continue a sequence"
    for chunk in plan.prefill:
        assert chunk.start == chunk.sequence.computed < chunk.stop <= len(chunk.sequence.tokens)
        assert len(chunk.sequence.pages) * subject.page_size >= chunk.stop
    for row in plan.decode:
        assert row.missing == 1
        end = min(len(row.tokens) + plan.steps, row.limit) - 1
        assert len(row.pages) * subject.page_size >= end
    most = 1 if plan.prefill else subject.decode_steps
    assert 0 < plan.steps <= most if plan.decode else plan.steps == 0


def run(subject, plan, random):
    """Do what an engine does with a plan; replies sometimes end early."""
    finished = []
    for chunk in plan.prefill:
        if not chunk.last:
            subject.advance(chunk)
    grown = [(chunk.sequence, 1) for chunk in plan.prefill if chunk.last]
    grown += [(row, min(plan.steps, row.limit - len(row.tokens))) for row in plan.decode]
    for row, most in grown:
        count = int(random.integers(1, most + 1))
        ended = len(row.tokens) + count >= row.limit or random.random() < 0.05
        if ended:
            subject.remove(row)
            finished.append(row)
        else:
            subject.accept(row, [7] * count)
    return finished


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    page_size=st.integers(1, 5),
    max_running=st.integers(1, 5),
    chunk_tokens=st.integers(1, 20),
    decode_steps=st.integers(1, 6),
    spare=st.integers(0, 30),
)
def test_every_request_ends_and_nothing_is_owned_twice(seed, page_size, max_running, chunk_tokens, decode_steps, spare):
    """A page leaks or is shared, a budget is exceeded, or a request starves, for some workload and sizes."""
    random = np.random.default_rng(seed)
    longest = 24
    subject = scheduler(pages_for(longest, page_size) + spare, page_size, max_running, chunk_tokens, 3, decode_steps)
    coming = []
    for _ in range(12):
        prompt = int(random.integers(1, longest))
        coming.append(sequence(prompt, int(random.integers(1, longest - prompt + 1))))
    ended, total = [], len(coming)
    for _ in range(5000):
        if coming and random.random() < 0.4:
            subject.add(coming.pop())
        plan = subject.plan()
        check_plan(subject, plan)
        check_pages(subject)
        if not plan.sequences:
            assert not subject.running
            assert not subject.waiting
        ended += run(subject, plan, random)
        alive = [*subject.running, *subject.waiting]
        if alive and random.random() < 0.03:
            victim = alive[int(random.integers(len(alive)))]
            subject.remove(victim)
            ended.append(victim)
        if len(ended) == total:
            break
    assert len({id(row) for row in ended}) == total
    assert subject.pool.free == subject.pool.count - 1


def test_plans_depend_on_the_past_alone():
    """Two schedulers with the same history plan differently, so a run cannot be reproduced."""
    first = scheduler(pages=12)
    for prompt in (5, 9, 3, 20):
        first.add(sequence(prompt, 6))
    second = copy.deepcopy(first)
    randoms = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(60):
        plans = [subject.plan() for subject in (first, second)]
        shown = [
            ([(len(c.sequence.tokens), *c[1:]) for c in plan.prefill], [r.pages for r in plan.decode], plan.steps)
            for plan in plans
        ]
        assert shown[0] == shown[1]
        for subject, plan, random in zip((first, second), plans, randoms, strict=True):
            run(subject, plan, random)


def test_requests_start_in_order_of_arrival():
    """A short request overtakes a long one that waits for pages."""
    subject = scheduler(pages=8, page_size=4, chunk_tokens=64)
    rows = [sequence(20, 4), sequence(20, 4), sequence(1, 1)]
    for row in rows:
        subject.add(row)
    assert [chunk.sequence for chunk in subject.plan().prefill] == rows[:1]


def test_replies_grow_while_a_long_prompt_is_prefilled():
    """A long prompt stalls the replies of others until it is done."""
    subject = scheduler(chunk_tokens=8)
    short, long = sequence(3, 20), sequence(32, 4)
    subject.add(short)
    assert subject.plan().prefill[0].last
    subject.accept(short, [1])
    subject.add(long)
    for stop in (8, 16, 24, 32):
        plan = subject.plan()
        assert plan == ((Chunk(long, stop - 8, stop),), (short,), 1)
        subject.accept(short, [1])
        subject.accept(long, [1]) if plan.prefill[0].last else subject.advance(plan.prefill[0])
    assert subject.plan() == ((), (short, long), 4)


def test_rows_have_their_pages_before_another_is_admitted():
    """A new request takes the page that a reply needs for its next token, and one of them is set back."""
    subject = scheduler(pages=3, page_size=4, chunk_tokens=64)
    first, second = sequence(4, 4), sequence(4, 2)
    subject.add(first)
    subject.plan()
    subject.accept(first, [1])
    subject.add(second)
    plan = subject.plan()  # one page for the reply's next token, one for the prompt: none is left to grow into
    assert plan == ((), (first,), 1)
    assert len(first.pages) == 2
    assert not subject.preemptions


def test_the_youngest_gives_way_and_is_computed_again_first():
    """When the cache is full an old reply is thrown away, or the request set back is overtaken."""
    subject = scheduler(pages=6, page_size=2, decode_steps=1, chunk_tokens=64)
    rows = [sequence(4, 8), sequence(4, 8)]
    for row in rows:
        subject.add(row)
    preempted = None
    for _ in range(12):
        plan = subject.plan()
        for chunk in plan.prefill:
            subject.accept(chunk.sequence, [1])
        for row in plan.decode:
            subject.accept(row, [1])
        if subject.preemptions:
            preempted = subject.waiting[0]
            break
    assert preempted is rows[1]
    assert preempted.tokens[:4] == [0, 1, 2, 3]
    assert len(preempted.tokens) > 4
    assert preempted.computed == 0
    subject.remove(rows[0])
    chunk = subject.plan().prefill[0]
    assert (chunk.sequence, chunk.start, chunk.stop) == (preempted, 0, len(preempted.tokens))


def test_nothing_to_do_is_an_empty_plan():
    """An idle engine spins on steps of nothing."""
    assert scheduler().plan() == Plan()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_pool_gives_all_or_nothing(count):
    """A request for too many pages keeps some of them."""
    pool = PagePool(3)
    taken = pool.take(count)
    assert taken == ([1, 2][:count] if count <= 2 else None)
    assert pool.free == (2 - count if count <= 2 else 2)
