"""Replies as text: ends, stop strings, what is held back."""

import pytest
from engine_toys import Letters

from dovetail_engine.reply import Reply
from dovetail_engine.runner import Produced
from dovetail_protocols import Completion, Request, SamplingParams, TokenLogprob


def produced(text):
    ids = [0 if c == "$" else ord(c) - 64 for c in text]
    return Produced(ids, [TokenLogprob(-float(i)) for i in ids])


def deltas(pieces, *, stops=(0,), tokenizer=True, **sampling):
    sampling = SamplingParams(**{"max_tokens": 50, "logprobs": 0} | sampling)
    reply = Reply(Request(prompt=[1], sampling=sampling), frozenset(stops), Letters() if tokenizer else None)
    found = []
    for piece in pieces:
        found.append(reply.push(produced(piece), 3))
        if found[-1].finish_reason:
            break
    return found


@pytest.mark.parametrize(
    ("text", "sampling", "expected", "tokens", "reason"),
    [
        ("ABC$DEF", {}, "ABC", 4, "stop"),
        ("ABCDEF", {"max_tokens": 4}, "ABCD", 4, "length"),
        ("ABC$", {"max_tokens": 4}, "ABC", 4, "stop"),
        ("ABCDEF", {"stop": ("CD",)}, "AB", 4, "stop"),
        ("ABCDEF", {"stop": ("CX",), "max_tokens": 3}, "ABC", 3, "length"),
        ("ABCDEF", {"stop": ("CD",), "max_tokens": 4}, "AB", 4, "stop"),
        ("ABC$DEF", {"stop": ("CD",)}, "ABC", 4, "stop"),
    ],
)
@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_where_a_reply_ends(text, sampling, expected, tokens, reason, cut):
    """Text or tokens after the end are sent, or the end depends on how many tokens a step produces."""
    parts = deltas([text[i : i + cut] for i in range(0, len(text), cut)], **sampling)
    done = Completion.join(parts)
    assert (done.text, len(done.token_ids), done.finish_reason) == (expected, tokens, reason)
    assert [entry.value for entry in done.logprobs] == [-float(i) for i in done.token_ids]
    assert all(part.version == 3 for part in parts)
    assert all(not part.finish_reason for part in parts[:-1])


def test_the_beginning_of_a_stop_string_is_held_back():
    """A reader sees the first characters of a stop string."""
    assert [d.text for d in deltas(["AC", "C", "D"], stop=("CD",))] == ["A", "C", ""]


def test_without_a_tokenizer_there_are_tokens_only():
    """An engine of bare tokens needs a tokenizer after all."""
    done = Completion.join(deltas(["AB", "C$"], tokenizer=False, logprobs=None))
    assert (done.text, done.token_ids, done.logprobs) == ("", (1, 2, 3, 0), None)
