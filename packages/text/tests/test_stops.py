import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_text import StopStrings

SMALL = st.text(alphabet="ab<", max_size=12)
STOPS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=4)


def naive(text, stops):
    """The first stop string to end, by str.find over the whole text."""
    found = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    return (text, None) if not found else (text[: min(found)[1]], min(found)[2])


@given(st.lists(SMALL, max_size=8), STOPS)
@settings(max_examples=500, deadline=None)
def test_equals_naive_find_for_any_cut(pieces, stops):
    """A stop string across two pieces is missed, or text before it is lost or doubled."""
    stream = StopStrings(stops)
    out = "".join(stream.push(piece) for piece in pieces) + stream.flush()
    assert (out, stream.matched) == naive("".join(pieces), stops)


@given(SMALL, STOPS)
@settings(max_examples=300, deadline=None)
def test_holds_back_only_what_may_become_a_stop(text, stops):
    """Text that is certain waits for no reason (a stalling stream)."""
    stream = StopStrings(stops)
    out = stream.push(text)
    if stream.matched is None:
        held = text[len(out) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_after_the_stop_and_bad_stops():
    """Text after the stop leaks out; an empty stop string is accepted."""
    stream = StopStrings(["END"])
    assert stream.push("aENDb") == "a"
    assert stream.push("c") == stream.flush() == ""
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
    with pytest.raises(TypeError, match="sequence"):
        StopStrings("END")
    with pytest.raises(TypeError):
        StopStrings([1])
