"""The plan against a brute-force stream, against Grain, and against its own promises."""

import grain
import numpy as np
import pytest
from data_toys import Arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_data import Permutation, Plan
from dovetail_protocols.testing import check_plan

FIELDS = ("tokens", "targets", "loss_weights", "positions", "segment_ids")


def stream(source, seed, epochs):
    """The stream as a list of (token, epoch, document, place in the document), by the book."""
    out = []
    for epoch in range(epochs):
        for document in Permutation(len(source), seed=seed, stream=epoch)(np.arange(len(source))):
            first = source.starts[document]
            out.extend((int(first + i), epoch, int(document), i) for i in range(source.lengths[document]))
    return out


def brute_rows(elements, seq_len, count, positions, across):
    """Rows made token by token."""
    batch = {name: np.zeros((count, seq_len), np.float32 if name == "loss_weights" else np.int32) for name in FIELDS}
    for row in range(count):
        part = elements[row * seq_len : row * seq_len + seq_len + 1]
        segment, place = 1, 0
        for i, (token, epoch, document, inside) in enumerate(part):
            if i and (epoch, document) != part[i - 1][1:3]:
                segment, place = segment + 1, 0
            if i < seq_len:
                batch["tokens"][row, i], batch["segment_ids"][row, i] = token, segment
                batch["positions"][row, i] = inside if positions == "continue" else place
            if i:
                same = (epoch, document) == part[i - 1][1:3]
                batch["targets"][row, i - 1] = token
                batch["loss_weights"][row, i - 1] = float(same or across)
            place += 1
    return batch


def shuffled_rows(source, seq_len, seed, epochs, count):
    """The order of rows by the book: whole blocks of an epoch's worth are permuted, the rest stays."""
    block = max(1, (source.tokens - 1) // seq_len)
    order = []
    for number in range(count // block + 1):
        rows = np.arange(number * block, min((number + 1) * block, count))
        if len(rows) and (number + 1) * block * seq_len <= epochs * source.tokens - 1:
            rows = number * block + Permutation(block, seed=seed, stream=2**63 + number)(np.arange(block))
        order.extend(rows.tolist())
    return order


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=14).filter(lambda lengths: sum(lengths) > 1)


@settings(max_examples=80, deadline=None)
@given(
    LENGTHS,
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 2**64 - 1),
    st.integers(1, 3),
    st.sampled_from(["restart", "continue"]),
    st.booleans(),
)
def test_every_batch_is_that_of_the_brute_force_stream(lengths, seq_len, batch, seed, epochs, positions, across):
    """Tokens, targets, weights, positions and segments of every step, padding at the end included."""
    source = Arrays(lengths)
    options = {"seq_len": seq_len, "batch": batch, "seed": seed, "epochs": epochs, "positions": positions}
    made = Plan(source, **options, across_documents=across, shuffle="documents")
    elements = stream(source, seed, epochs)
    expected = brute_rows(elements, seq_len, made.steps * batch, positions, across)
    got = [made.at(step) for step in range(made.steps)]
    for name in FIELDS:
        whole = np.concatenate([getattr(part, name) for part in got])
        assert whole.dtype == expected[name].dtype
        np.testing.assert_array_equal(whole, expected[name], err_msg=name)
    assert (made.steps - 1) * batch * seq_len < len(elements) - 1 <= made.steps * batch * seq_len
    shuffled = Plan(source, **options, across_documents=across)
    got = [shuffled.at(step) for step in range(shuffled.steps)]
    order = shuffled_rows(source, seq_len, seed, epochs, made.steps * batch)
    for name in FIELDS:
        whole = np.concatenate([getattr(part, name) for part in got])
        np.testing.assert_array_equal(whole, expected[name][order], err_msg=name)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 7), st.integers(1, 3))
def test_every_token_is_a_target_exactly_once_per_epoch(lengths, seq_len, batch):
    """The stream's very first token aside; an epoch neither loses nor repeats a document."""
    source = Arrays(lengths)
    options = {"seq_len": seq_len, "batch": batch, "seed": 1, "epochs": 2}
    made = Plan(source, **options, across_documents=True)
    parts = [made.at(step) for step in range(made.steps)]
    targets = np.concatenate([p.targets[p.loss_weights == 1] for p in parts])
    first = Plan(source, **options, shuffle="documents").at(0).tokens[0, 0]
    assert sorted([first, *targets]) == sorted([*range(source.tokens)] * 2)
    usual = Plan(source, **options)
    weights = sum(float(usual.at(step).loss_weights.sum()) for step in range(usual.steps))
    assert weights == 2 * (source.tokens - np.count_nonzero(source.lengths))


def test_rows_of_a_batch_come_from_many_documents():
    """Breaks when a batch is one long document: its gradient says little about the corpus."""
    source = Arrays([640] * 40)
    options = {"seq_len": 64, "batch": 16, "seed": 3}

    def documents(made, step):
        return len({piece.document for row in made.explain(step).rows for piece in row})

    apart, together = Plan(source, **options), Plan(source, **options, shuffle="documents")
    assert min(documents(apart, step) for step in range(25)) >= 10
    assert max(documents(together, step) for step in range(25)) <= 4


def test_a_plan_without_end_has_the_same_batches_as_a_finite_one(source):
    """`epochs` says where to end and nothing else."""
    finite = Plan(source, seq_len=5, batch=3, seed=2, epochs=3)
    endless = Plan(source, seq_len=5, batch=3, seed=2)
    assert endless.steps is None
    assert finite.fingerprint == endless.fingerprint
    whole_blocks = 3 * ((source.tokens - 1) // 5) // 3
    assert finite.steps - whole_blocks <= 2
    for step in range(whole_blocks):
        np.testing.assert_equal(finite.at(step), endless.at(step))
    assert endless.steps_per_epoch == source.tokens / 15
    last = finite.at(finite.steps - 1)
    assert (last.loss_weights[last.segment_ids == 0] == 0).all()


def test_far_steps_cost_no_more_and_do_not_overflow(source):
    """Step 10**15 of an endless plan: token positions beyond int32 and near the end of int64."""
    made = Plan(source, seq_len=64, batch=8, seed=0, shuffle="documents")
    step = 10**15
    batch = made.at(step)
    piece = made.explain(step).rows[0][0]
    assert piece.epoch == step * 8 * 64 // source.tokens
    assert batch.tokens[0, 0] == source.starts[piece.document] + piece.start
    shuffled = Plan(source, seq_len=64, batch=8, seed=0)
    piece = shuffled.explain(step).rows[0][0]
    assert shuffled.at(step).tokens[0, 0] == source.starts[piece.document] + piece.start


def test_offsets_beyond_32_bits_are_right():
    """A cache of more than 2**31 tokens; only the asked pieces are read."""

    class Huge(Arrays):
        def gather(self, documents, starts, stops):
            pieces = [np.arange(a, b) % 97 for a, b in zip(starts, stops, strict=True)]
            return np.concatenate(pieces).astype(np.uint32)

        @property
        def vocab_size(self):
            return 97

    source = Huge([3_000_000_000, 5_000_000_000])
    made = Plan(source, seq_len=1000, batch=2, seed=0, shuffle="documents")
    step = 7_999_999_000 // 2000
    rows = made.explain(step).rows
    assert rows[0][0].stop > 2**31
    assert made.at(step).tokens[0, 0] == rows[0][0].start % 97
    with pytest.raises(ValueError, match="int32"):
        Plan(source, seq_len=1000, batch=2, seed=0, positions="continue")


def test_the_rows_are_those_of_grains_concat_then_split(source):
    """The same documents in the same order through the peer: tokens, segments and positions."""
    seq_len = 8
    order = Permutation(len(source), seed=4)(np.arange(len(source)))
    documents = [{"tokens": source.starts[i] + np.arange(source.lengths[i])} for i in order]
    parent = grain.MapDataset.source(documents).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    peer = list(grain.experimental.ConcatThenSplitIterDataset(parent, length_struct={"tokens": seq_len}))
    made = Plan(source, seq_len=seq_len, batch=1, seed=4, epochs=1, positions="continue", shuffle="documents")
    for row in range(source.tokens // seq_len - 1):
        batch = made.at(row)
        np.testing.assert_array_equal(batch.tokens[0], peer[row]["tokens"])
        np.testing.assert_array_equal(batch.segment_ids[0], peer[row]["tokens_segment_ids"])
    kept = sorted(token for row in peer for token in row["tokens"][row["tokens_segment_ids"] > 0])
    assert kept == list(range(source.tokens))


def test_epochs_differ_and_seeds_differ(source):
    """A shuffle that repeats itself each epoch is memorised."""
    made = Plan(source, seq_len=source.tokens, batch=1, seed=0)
    epochs = [made.at(step).tokens[0] for step in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [sorted(epoch) for epoch in epochs] == [list(range(source.tokens))] * 3
    assert Plan(source, seq_len=9, batch=1, seed=1).at(0).tokens.tolist() != made.at(0).tokens[:, :9].tolist()


def test_rows_of_a_step_are_slices_of_its_batch(source):
    """What a process reads of a batch."""
    made = Plan(source, seq_len=7, batch=6, seed=0, epochs=1)
    for step in range(made.steps):
        whole, part = made.at(step), made.rows_at(step, 2, 5)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[2:5])
    for start, stop in ((-1, 2), (2, 2), (4, 7)):
        with pytest.raises(IndexError, match="of a batch of 6"):
            made.rows_at(0, start, stop)


def test_skipped_steps_are_left_out_and_nothing_else_changes(source):
    """A skip names what was seen in the log; peers got relative and absolute steps wrong (defect 12)."""
    options = {"seq_len": 5, "batch": 2, "seed": 0}
    whole = Plan(source, **options)
    made = Plan(source, **options, skip=[(7, 9), (2, 4), (4, 5)])
    for step, raw in enumerate([0, 1, 5, 6, 9, 10]):
        np.testing.assert_equal(made.at(step), whole.at(raw))
        explanation = made.explain(step)
        assert (explanation.step, explanation.raw_step) == (step, raw)
        assert explanation.rows == whole.explain(raw).rows
    finite = Plan(source, **options, epochs=1, skip=[(0, 2), (10, 10**6)])
    assert finite.steps == 8
    with pytest.raises(IndexError, match="0 to 7"):
        finite.at(8)


def test_explain_names_the_documents_of_every_token(cache):
    """The question after a loss spike: what was in this batch?"""
    made = Plan(cache, seq_len=30, batch=4, seed=0)
    for step in range(12):
        batch, explanation = made.at(step), made.explain(step)
        for row, pieces in enumerate(explanation.rows):
            tokens = [*batch.tokens[row], batch.targets[row, -1]]
            for piece in pieces:
                ids = [np.array([value]) for value in (piece.document, piece.start, piece.stop)]
                assert tokens[piece.column : piece.column + piece.stop - piece.start] == cache.gather(*ids).tolist()
                assert piece.origin == str(piece.document)
            assert pieces[-1].column + pieces[-1].stop - pieces[-1].start == 31
            assert batch.segment_ids[row].max() in (len(pieces), len(pieces) - 1)
    assert f"document {explanation.rows[0][0].document} tokens" in str(explanation)


def test_the_end_token_is_a_target_and_a_first_token_is_not(cache):
    """A model that never learns to end writes for ever."""
    made = Plan(cache, seq_len=50, batch=4, seed=0, epochs=1)
    batches = [made.at(step) for step in range(made.steps)]
    targets, weights, inputs = (
        np.concatenate([getattr(b, name).ravel() for b in batches]) for name in ("targets", "loss_weights", "tokens")
    )
    kept = np.concatenate([b.segment_ids.ravel() for b in batches]) > 0
    ends = (targets == cache.eos_id) & (inputs != cache.eos_id)
    assert (weights[ends] == 1).all()
    assert ends.sum() > 25
    assert (weights[(inputs == cache.eos_id) & kept] == 0).all()
    across = Plan(cache, seq_len=50, batch=4, seed=0, epochs=1, across_documents=True)
    total = sum(across.at(step).loss_weights.sum() for step in range(across.steps))
    assert total == cache.tokens - 1


def test_the_conformance_kit_accepts_it(source):
    """Whatever the trainer relies on."""
    options = {"seq_len": 6, "batch": 4}
    made, twin, other = (Plan(source, **options, seed=seed) for seed in (0, 0, 1))
    check_plan(made, twin=twin, other=other)


@pytest.mark.parametrize("name", FIELDS)
def test_writing_into_a_batch_reaches_no_other_array(source, name):
    """A batch is the caller's: no array shares memory with another, or with the next batch."""
    made = Plan(source, seq_len=6, batch=4, seed=0)
    before = [np.copy(leaf) for leaf in made.at(0)]
    batch = made.at(0)
    getattr(batch, name)[...] = 77
    np.testing.assert_equal(
        [v for k, v in batch._asdict().items() if k != name],
        [old for k, old in zip(batch._fields, before, strict=True) if k != name],
    )
    np.testing.assert_equal(list(made.at(0)), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len=0; expected at least 1"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"epochs": 0}, "epochs=0"),
        ({"skip": [(2, 1)]}, "skip range"),
        ({"positions": "absolute"}, "positions='absolute'; expected one of"),
        ({"shuffle": "words"}, "shuffle='words'; expected one of"),
    ],
)
def test_wrong_options_are_refused(source, options, message, untyped):
    """Each would fail later, or give data that nobody asked for."""
    with pytest.raises(ValueError, match=message):
        Plan(source, **({"seq_len": 4, "batch": 2, "seed": 0} | options))


def test_too_small_sources_and_steps_out_of_range_are_refused(source):
    """One token has no target; negative steps do not count from the end."""
    with pytest.raises(ValueError, match="has 1 tokens"):
        Plan(Arrays([1]), seq_len=4, batch=2, seed=0)
    finite = Plan(source, seq_len=4, batch=2, seed=0, epochs=1)
    for step in (-1, finite.steps):
        with pytest.raises(IndexError, match=f"step {step}; this plan has the steps 0 to {finite.steps - 1}"):
            finite.at(step)
    with pytest.raises(IndexError, match="0 or more"):
        Plan(source, seq_len=4, batch=2, seed=0).explain(-1)
    with pytest.raises(TypeError):
        finite.at(1.0)
