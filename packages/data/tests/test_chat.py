"""Conversations: what is learned of them, the caches that hold it, and the weights of batches."""

import json

import numpy as np
import pytest
from data_toys import BOS, EOS, HEADS, Chat, PlainChat

from dovetail_data import (
    CacheError,
    ChatEncoder,
    CorpusError,
    Mixture,
    Plan,
    TokenCache,
    WithBos,
    build_cache,
    from_documents,
)


def message(role, content="", **others):
    return {"role": role, "content": content, **others}


TALK = [
    message("system", "be kind"),
    message("user", "hi"),
    message("assistant", "hello"),
    message("user", "2+2?"),
    message("assistant", "4"),
]
CALL = [
    message("user", "time?"),
    message("assistant", tool_calls=[{"name": "clock"}]),
    message("tool", "noon"),
    message("assistant", "noon."),
]


def learned(encoder, value):
    (pair,) = encoder.encode_weighted([json.dumps(value)])
    ids, weights = pair
    assert len(ids) == len(weights)
    parts, inside = [], False
    for token, weight in zip(ids, weights, strict=True):
        if weight and not inside:
            parts.append("")
        inside = bool(weight)
        if weight:
            parts[-1] += chr(token) if token < EOS else "<end>"
    return parts


@pytest.mark.parametrize(
    ("options", "value", "expected"),
    [
        ({}, TALK, ["hello<end>", "4<end>"]),
        ({"last_only": True}, TALK, ["4<end>"]),
        ({"roles": ["user"]}, TALK, ["hi<end>", "2+2?<end>"]),
        ({"roles": ["assistant", "system"]}, {"messages": TALK}, ["be kind<end>", "hello<end>", "4<end>"]),
        ({}, CALL, ['[{"name": "clock"}]<end>', "noon.<end>"]),
        ({}, {"messages": CALL, "tools": [{"name": "clock"}]}, ['[{"name": "clock"}]<end>', "noon.<end>"]),
        ({"messages": "talk"}, {"talk": TALK[1:3]}, ["hello<end>"]),
        ({}, [message("user", "hi")], []),
        ({}, [message("assistant", "first")], ["first<end>"]),
    ],
)
def test_what_is_learned(options, value, expected):
    """By role, with tool calls and the token that ends a turn; headers and line breaks are not."""
    assert learned(ChatEncoder(Chat(), **options), value) == expected


def test_templates_that_render_earlier_turns_in_another_way():
    """No prefix of the whole: a message's own text and its end token are learned, as they stand in the whole."""
    talk = [
        message("user", "a"),
        message("assistant", "hm... b"),
        message("user", "c"),
        message("assistant", "hm... d"),
    ]
    assert learned(ChatEncoder(Chat(drops_thoughts=True)), talk) == ["b<end>", "hm... d<end>"]


@pytest.mark.parametrize("workers", [1, 2])
def test_caches_hold_what_is_learned(tmp_path, workers):
    """Across shards, processes and a cut build; the end token of a document is learned where nothing else ends it."""
    texts = [json.dumps(TALK[: 2 + n % 4]) for n in range(30)]
    encoder = ChatEncoder(Chat())
    cache = build_cache(texts, encoder, tmp_path / "cache", workers=workers, shard_tokens=200)
    assert len(cache.manifest.shards) > 3
    every = np.arange(len(cache))
    flat = cache.weights(every, np.zeros_like(every), cache.lengths)
    pairs = encoder.encode_weighted(texts)
    assert flat.tolist() == [w for _, weights in pairs for w in [*weights, 0]]
    assert TokenCache.open(tmp_path / "cache", verify="full").fingerprint == cache.fingerprint
    path = next((tmp_path / "cache").glob("*.weights"))
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=path.name):
        TokenCache.open(tmp_path / "cache", verify="full")


def test_other_rules_are_another_cache(tmp_path):
    """The same tokens, learned otherwise, must not be taken for the same data."""
    texts = [json.dumps(TALK)]
    one = build_cache(texts, ChatEncoder(Chat()), tmp_path / "a")
    other = build_cache(texts, ChatEncoder(Chat(), last_only=True), tmp_path / "b")
    assert one.fingerprint != other.fingerprint
    with pytest.raises(CacheError, match="tokenizer"):
        build_cache(texts, ChatEncoder(Chat(), last_only=True), tmp_path / "a")


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_weights_of_batches(tmp_path, packing):
    """A target counts where its token is learned, in every packing, behind views and in mixtures."""
    texts = [json.dumps(TALK[: 2 + n % 4]) for n in range(12)]
    cache = build_cache(texts, ChatEncoder(Chat()), tmp_path / "chat")
    plain = build_cache([text * 3 for text in texts], PlainChat(), tmp_path / "plain")
    every = np.arange(len(cache))
    total = int(cache.weights(every, np.zeros_like(every), cache.lengths).sum())
    options = {"seq_len": 64, "batch": 3, "seed": 0, "packing": packing, "epochs": 1}
    for source in (cache, WithBos(cache, BOS)):
        made = Plan(source, **options)
        batches = [made.at(step) for step in range(made.steps)]
        assert sum(float(batch.loss_weights.sum()) for batch in batches) == total
        for batch in batches:
            kept = batch.loss_weights > 0
            assert not np.isin(batch.targets[kept], [BOS, *HEADS.values(), 10]).any()
    train, _ = cache.split(0.25)
    assert set(np.unique(train.weights(np.arange(3), np.zeros(3, int), train.lengths[:3]))) == {0, 1}
    del options["epochs"]
    mixed = Plan(Mixture({"chat": cache, "web": plain}, {"chat": 1, "web": 1}), **options)
    batch, rows = mixed.at(0), mixed.explain(0).rows
    for row, pieces in enumerate(rows):
        inside = batch.segment_ids[row] > 0
        share = batch.loss_weights[row][inside].mean()
        assert share > 0.9 if pieces[0].source == "web" else share < 0.6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not JSON"),
        ("[]", "expected a list of messages"),
        ('{"talk": []}', "'messages' and possibly a list in 'tools'"),
        ('[{"content": "x"}]', "each with a role"),
        ('{"messages": [{"role": "user"}], "tools": 3}', "a list in 'tools'"),
        ('[{"role": "wizard"}]', "the chat template refuses .* role 'wizard'"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, text, message):
    with pytest.raises(CorpusError, match=message):
        build_cache(from_documents([text]), ChatEncoder(Chat()), tmp_path / "cache")


def test_roles_are_a_list(untyped):
    for roles in ((), "assistant"):
        with pytest.raises(ValueError, match=r"expected a sequence"):
            ChatEncoder(Chat(), roles=roles)
