import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_protocols import Tokenizer as Protocol
from dovetail_text import TokenizerError, train_bpe
from dovetail_text.decoding import byte_of_symbol


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_every_text_round_trips(tokenizer, text):
    """Some text cannot be encoded, or comes back different."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_every_byte_string_has_tokens(tokenizer, data):
    """One of the 256 bytes is missing from the vocabulary."""
    vocab = tokenizer.vocab()
    symbol = {byte: char for char, byte in byte_of_symbol().items()}
    ids = [vocab[symbol[byte]] for byte in data]
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")


def test_same_texts_same_fingerprint_in_another_process(texts):
    """Training depends on hash seeds, threads or the process."""
    code = (
        "import json,sys; from dovetail_text import train_bpe; t = train_bpe(json.loads(sys.argv[1]), 380); "
        "print(t.fingerprint)"
    )
    prints = {train_bpe(texts, 380).fingerprint, train_bpe(iter(texts), 380).fingerprint}
    for seed, threads in (("1", "1"), ("2", "3")):
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(texts)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"},
        )
        prints.add(done.stdout.strip())
    assert len(prints) == 1
    assert train_bpe(texts[:2], 380).fingerprint not in prints


def test_layout_of_ids(tokenizer):
    """Special tokens, bytes and merges move to other ids, so that old caches no longer fit."""
    assert isinstance(tokenizer, Protocol)
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert sorted(tokenizer.token_bytes(i)[0] for i in range(3, 259)) == list(range(256))
    assert tokenizer.vocab_size == 380
    assert tokenizer.eos_ids == (0, 2)
    assert tokenizer.bos_id is None


def test_merges_keep_lines_and_words_apart(tokenizer):
    """A token spans two words or carries text across a line break."""
    for i in range(259, tokenizer.vocab_size):
        text = tokenizer.token_bytes(i).decode("utf-8", "replace")
        assert "\n" not in text.strip()
        assert " " not in text.strip()


def test_progress_and_small_corpus(caplog):
    """Progress is not reported, or a vocabulary smaller than asked for goes unnoticed."""
    calls = []
    with caplog.at_level(logging.WARNING):
        tokenizer = train_bpe(["ab", "cde"], 1000, progress=lambda n, c: calls.append((n, c)))
    assert calls == [(1, 2), (2, 5)]
    assert "1000" in caplog.text
    assert tokenizer.vocab_size < 1000


def test_other_special_tokens(texts):
    """Without ChatML's tokens a ChatML template would be attached that cannot work."""
    tokenizer = train_bpe(texts, 300, special_tokens=["<eot>"])
    assert tokenizer.chat_template is None
    assert tokenizer.eos_ids == (0,)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((["a"], 258), TokenizerError, "at least 259"),
        (([], 300), TokenizerError, "0 texts"),
        ((["", ""], 300), TokenizerError, "2 texts"),
        (([b"a"], 300), TypeError, "document 0 is a bytes"),
        (("a", 300), TypeError, "one string"),
        ((["a\ud800"], 300), (TokenizerError, UnicodeEncodeError), "surrogate"),
    ],
)
def test_bad_input(arguments, error, match):
    """Bad input gives a tokenizer, or an error that does not say what is wrong."""
    with pytest.raises(error, match=match):
        train_bpe(*arguments)


@pytest.mark.parametrize("special", [[], ["a", "a"], [""], "<eos>"])
def test_bad_special_tokens(special):
    """Unusable special tokens are accepted."""
    with pytest.raises(TokenizerError, match="special_tokens"):
        train_bpe(["a"], 300, special_tokens=special)
