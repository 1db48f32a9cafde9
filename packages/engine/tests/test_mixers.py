"""The paged mixers against textbook attention: windows, groups, chunks, pages."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_engine.mixers import DecodeMixer, MixedMixer
from dovetail_engine.pages import pages_for
from dovetail_kernels import DenseMixer
from dovetail_protocols.testing import attention

PAGE, DIM, VALUE = 4, 8, 5
SINKS = jnp.array([0.5, -1.0, 2.0, 0.0])  # of 4 heads


def empty(pages, kv_heads, layers=1):
    """Return a cache of NaN: what was not written must not be read."""
    made = [jnp.full((pages, kv_heads, PAGE, dim), jnp.nan, jnp.float32) for dim in (DIM, VALUE)]
    return tuple(tuple(pool.at[0].set(0.0) for pool in made) for _ in range(layers))


def draw(rng, tokens, heads, kv_heads):
    return tuple(
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((tokens, heads, DIM), (tokens, kv_heads, DIM), (tokens, kv_heads, VALUE))
    )


def textbook(q, k, v, **options):
    segments = np.ones((1, len(q)), int)
    return attention(*map(np.asarray, (q, k, v)), segments, scale=0.3, **options)


def attend(mixer, *flat, **options):
    return mixer.attend(0, *flat, scale=0.3, **options)


def step(cache, q, k, v, spans, pages, newest=0, call=attend, **options):
    """Compute the spans (start, stop) of sequences that are given as whole q, k and v; the last ones are newest."""
    total = sum(stop - start for start, stop in spans)
    size = total + 3  # padding at the end
    segments, positions, places = (np.zeros(size, np.int32) for _ in range(3))
    rows = newest + 1  # one without a sequence
    stands, lengths, tables = np.full(rows, size, np.int32), np.zeros(rows, np.int32), np.zeros((rows, 9), np.int32)
    parts, at = [[], [], []], 0
    for i, (start, stop) in enumerate(spans):
        part = slice(at, at + stop - start)
        segments[part], positions[part] = i + 1, np.arange(start, stop)
        places[part] = np.asarray(pages[i])[positions[part] // PAGE]
        for found, x in zip(parts, (q[i], k[i], v[i]), strict=True):
            found.append(x[start:stop])
        row = i - len(spans) + newest
        if row >= 0:
            assert stop == start + 1
            stands[row], lengths[row], tables[row, : len(pages[i])] = at, stop, pages[i]
        at += stop - start
    flat = [jnp.concatenate([*found, jnp.full((3, *found[0].shape[1:]), 7.0)]) for found in parts]
    context = None
    if spans[0][0] and newest < len(spans):
        held = pages[0][: pages_for(spans[0][0], PAGE)]
        context = jnp.asarray([*held, 0], jnp.int32)
    tokens = map(jnp.asarray, (segments, positions, places))
    mixer = MixedMixer(cache, *tokens, context, *map(jnp.asarray, (stands, tables, lengths)))
    out, mixer = call(mixer, *flat, **options)
    return np.split(np.asarray(out[:total]), np.cumsum([b - a for a, b in spans])[:-1]), mixer.cache


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("lengths", "cut", "grouped", "options", "steps"),
    [
        ([5], 0, (2, 2), {}, 3),
        ([9, 2], 5, (4, 2), {"window": 3, "sinks": SINKS}, 5),
        ([1, 1, 4], 0, (3, 1), {"window": 1, "softcap": 0.5}, 2),
        ([11, 3], 8, (4, 2), {"window": 6, "softcap": 0.5, "sinks": SINKS}, 6),
    ],
)
def test_chunks_then_steps_are_one_attention(lengths, cut, grouped, options, steps):
    """A chunk, a page boundary, a window or a step sees too much or too little."""
    rng = np.random.default_rng(0)
    heads, kv_heads = grouped
    whole = [draw(rng, length + steps, heads, kv_heads) for length in lengths]
    q, k, v = zip(*whole, strict=True)
    expected = [textbook(*each, **options) for each in whole]
    order = iter(rng.permutation(np.arange(1, 40)).tolist())
    pages = [[next(order) for _ in range(pages_for(length + steps, PAGE))] for length in lengths]
    cache = empty(40, kv_heads)
    if cut:
        (first,), cache = step(cache, q[:1], k[:1], v[:1], [(0, cut)], pages[:1], **options)
        np.testing.assert_allclose(first, expected[0][:cut], atol=1e-5)
    spans = [(cut, lengths[0]), *((0, length) for length in lengths[1:])]
    outs, cache = step(cache, q, k, v, spans, pages, **options)
    for out, (start, stop), wanted in zip(outs, spans, expected, strict=True):
        np.testing.assert_allclose(out, wanted[start:stop], atol=1e-5)
    rows = len(lengths)
    held = np.zeros((rows, 4), np.int32)
    places = np.zeros((rows, steps), np.int32)
    for i, length in enumerate(lengths):
        count = pages_for(length, PAGE)
        held[i, :count] = pages[i][:count]
        places[i] = np.asarray(pages[i])[(length + np.arange(steps)) // PAGE]
    batch = types.SimpleNamespace(context=jnp.asarray(held), lengths=jnp.asarray(lengths, jnp.int32))
    batch.pages = jnp.asarray(places)
    mixer = DecodeMixer.load(cache, batch, steps)
    for index in range(steps):
        now = [jnp.stack([x[i][length + index] for i, length in enumerate(lengths)]) for x in (q, k, v)]
        mixer = DecodeMixer(mixer.work, mixer.lengths, jnp.int32(index), steps)
        out, mixer = mixer.attend(0, *now, scale=0.3, **options)
        wanted = np.stack([expected[i][length + index] for i, length in enumerate(lengths)])
        np.testing.assert_allclose(out, wanted, atol=1e-5)
    ((keys, values),) = mixer.store(cache, batch)
    for i, length in enumerate(lengths):
        own = np.asarray(pages[i])
        at = np.arange(length + steps)
        np.testing.assert_array_equal(np.asarray(keys)[own[at // PAGE], :, at % PAGE], k[i])
        np.testing.assert_array_equal(np.asarray(values)[own[at // PAGE], :, at % PAGE], v[i])


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.5, "sinks": SINKS}], ids=str)
def test_single_tokens_and_chunks_share_a_step(options):
    """A single token sees its neighbours in the step, not its sequence; a chunk sees single tokens or loses its own."""
    rng = np.random.default_rng(1)
    lengths, grown = [11, 6, 4, 9], 3
    whole = [draw(rng, length + grown, 4, 2) for length in lengths]
    q, k, v = zip(*whole, strict=True)
    expected = [textbook(*each, **options) for each in whole]
    pages = np.random.default_rng(2).permutation(np.arange(1, 40))[:28].reshape(4, 7).tolist()
    cache = empty(40, 2)
    _, cache = step(cache, q[2:], k[2:], v[2:], [(0, 4), (0, 9)], pages[2:], **options)
    for index, first in enumerate([(0, 5), (5, 9), (9, 11)]):
        at = [first, (2 * index, 2 * index + 2), (4 + index, 5 + index), (9 + index, 10 + index)]
        # the second sequence is prefilled alone, so that only the first one continues
        chosen = [0, 2, 3] if index else [0, 1, 2, 3]
        spans = [at[i] for i in chosen]
        given = ([x[i] for i in chosen] for x in (q, k, v))
        outs, cache = step(cache, *given, spans, [pages[i] for i in chosen], newest=2, **options)
        for out, i, (start, stop) in zip(outs, chosen, spans, strict=True):
            np.testing.assert_allclose(out, expected[i][start:stop], atol=1e-5)


def test_latents_are_absorbed_as_they_are_expanded():
    """Chunks, context, single tokens and steps over cached latents give what a dense mixer's expanded ones give."""
    rng, lengths, steps = np.random.default_rng(3), [9, 6], 3
    key, value = (jnp.asarray(rng.standard_normal((5, 3, dim)), jnp.float32) for dim in (4, 6))
    whole = [
        tuple(jnp.asarray(rng.standard_normal((n + steps, *shape)), jnp.float32) for shape in ((3, 6), (5,), (2,)))
        for n in lengths
    ]
    dense = [DenseMixer.of(jnp.zeros((1, len(q)), jnp.int32)) for q, _, _ in whole]
    expected = [m.attend_latent(0, *each, (key, value), scale=0.3)[0] for m, each in zip(dense, whole, strict=True)]
    pages = [[7, 3, 5, 9], [1, 4, 8]]
    cache = ((jnp.full((10, 1, PAGE, 7), jnp.nan).at[0].set(0.0),),)

    def call(mixer, *flat):
        return mixer.attend_latent(0, *flat, (key, value), scale=0.3)

    parts = tuple(zip(*whole, strict=True))
    at = [[(0, 5), (0, 6)], [(5, 9), (6, 7)]]
    for newest, spans in enumerate(at):
        outs, cache = step(cache, *parts, spans, pages, newest=newest, call=call)
        for out, wanted, (start, stop) in zip(outs, expected, spans, strict=True):
            np.testing.assert_allclose(out, wanted[start:stop], atol=1e-5)
    lengths = np.array([9, 7], np.int32)
    batch = types.SimpleNamespace(context=jnp.array([[7, 3, 5], [1, 4, 0]]), lengths=jnp.asarray(lengths))
    mixer = DecodeMixer.load(cache, batch, 2)
    for index in range(2):
        now = [jnp.stack([x[i][length + index] for i, length in enumerate(lengths)]) for x in parts]
        out, mixer = call(DecodeMixer(mixer.work, mixer.lengths, jnp.int32(index), 2), *now)
        np.testing.assert_allclose(
            out, np.stack([e[n + index] for e, n in zip(expected, lengths, strict=True)]), atol=1e-5
        )
    batch.pages = jnp.array([[5, 5], [4, 8]])
    ((latents,),) = mixer.store(cache, batch)
    own, places = np.asarray(pages[1]), np.arange(9)
    held = np.asarray(latents)[own[places // PAGE], 0, places % PAGE]
    np.testing.assert_array_equal(held, np.concatenate(whole[1][1:], axis=1)[:9])
