import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def stream(tokenizer, ids, cuts):
    """Decode in pieces; check that no piece but the last holds half a character; return the pieces."""
    decoder, pieces, begin = tokenizer.decoder(), [], 0
    for cut in [*sorted(min(c, len(ids)) for c in cuts), len(ids)]:
        pieces.append(decoder.push(ids[begin:cut]))
        begin = cut
    return [*pieces, decoder.flush()]


CUTS = st.lists(st.integers(0, 60), max_size=12)


@given(st.lists(st.integers(0, 379), max_size=60), CUTS)
@settings(max_examples=500, deadline=None)
def test_any_ids_in_any_pieces(tokenizer, ids, cuts):
    """Invalid bytes, special tokens or a cut inside a character make the stream differ from decode."""
    assert "".join(stream(tokenizer, ids, cuts)) == tokenizer.decode(ids)


@given(st.text(), CUTS)
@settings(max_examples=300, deadline=None)
def test_no_half_character(tokenizer, text, cuts):
    """A valid text's stream shows U+FFFD for a character that is not complete yet."""
    pieces = stream(tokenizer, tokenizer.encode(text), cuts)
    assert "".join(pieces) == text
    assert sum(p.count("�") for p in pieces) == text.count("�")


@pytest.mark.parametrize("name", ["llama_like", "wordpiece"])
@given(text=st.text(st.sampled_from("ab to the.,'s \n日🙂ü</s>")), cuts=CUTS)
@settings(max_examples=300, deadline=None)
def test_other_vocabularies(name, request, text, cuts):
    """Leading spaces, byte fallback or punctuation come out differently in a stream."""
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids, cuts)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 700), max_size=40), CUTS)
@settings(max_examples=300, deadline=None)
def test_byte_fallback_with_any_ids(llama_like, ids, cuts):
    """A run of invalid byte tokens comes out differently in a stream."""
    known = set(llama_like.vocab().values())
    ids = [i for i in ids if i in known]
    assert "".join(stream(llama_like, ids, cuts)) == llama_like.decode(ids)


def test_a_decoder_can_be_used_again_and_refuses_unknown_ids(tokenizer):
    """State of one text leaks into the next; an unknown id disappears silently."""
    decoder = tokenizer.decoder()
    ids = tokenizer.encode("🦊")
    assert decoder.push(ids[:1]) == ""
    assert decoder.flush() == "�"
    assert decoder.push(ids) == "🦊"
    with pytest.raises(ValueError, match="unknown ids"):
        decoder.push([10**6])
