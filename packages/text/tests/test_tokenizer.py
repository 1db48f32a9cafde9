import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from dovetail_text import Tokenizer, TokenizerError, train_bpe

NAMES = st.lists(st.sampled_from(["<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|im_", "end|>", "a", " ", "\n", "ü"]))


def reference(tokenizer):
    """The Hugging Face tokenizer of the same description, as a user would load it."""
    return tokenizers.Tokenizer.from_str(json.dumps(pickle.loads(pickle.dumps(tokenizer))._spec))


@pytest.mark.parametrize("name", ["tokenizer", "llama_like", "wordpiece"])
def test_equals_the_library_on_plain_text(name, request, texts):
    """Our wrapper changes how text is encoded."""
    ours = request.getfixturevalue(name)
    theirs = reference(ours)
    for text in [*texts, "", " ", "  a", "a\n\n  b", "日本🙂"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["tokenizer", "llama_like"])
@given(parts=NAMES)
@settings(max_examples=200, deadline=None)
def test_special_names_are_data(name, request, parts):
    """A user's text reaches the model as a control token (prompt injection)."""
    tokenizer, text = request.getfixturevalue(name), "".join(parts)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    first = " " if name == "llama_like" else ""  # its decoder takes a space from the start, as SentencePiece does
    assert tokenizer.decode(ids) == text.removeprefix(first)
    assert tokenizer.encode_batch([text, "b"]) == [ids, tokenizer.encode("b")]


@pytest.mark.parametrize("make", [models.WordLevel, models.BPE])
def test_special_tokens_that_the_model_itself_makes(make):
    """A vocabulary that contains the name as an ordinary word produces the special token from plain text."""
    vocab = {"<s>": 0, "<": 1, "s": 2, ">": 3, "<s": 4, "s>": 5, "?": 6}
    model = models.WordLevel(vocab, "?") if make is models.WordLevel else models.BPE(vocab, [("<", "s"), ("<s", ">")])
    engine = tokenizers.Tokenizer(model)
    engine.add_special_tokens(["<s>"])
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(engine.to_str(), named={"bos_token": "<s>"})
    assert tokenizer.bos_id == 0
    for text in ("<s>", "<s> <s>"):
        assert 0 not in tokenizer.encode(text)
        assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_named_tokens_become_special():
    """An end token that only the configuration names stays forgeable."""
    engine = tokenizers.Tokenizer(models.BPE({"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}, [("<", "e"), ("<e", ">")]))
    assert Tokenizer(engine.to_str()).encode("<e>") == [4]
    assert 4 not in Tokenizer(engine.to_str(), eos_tokens=["<e>"]).encode("<e>")
    with pytest.raises(TokenizerError, match=r"'<x>'.*not in the vocabulary"):
        Tokenizer(engine.to_str(), eos_tokens=["<x>"])


def test_a_special_token_of_one_character_cannot_be_data():
    """There is no other way to write the character: silence would be an injection."""
    engine = tokenizers.Tokenizer(models.BPE({"a": 0, "$": 1}, []))
    engine.add_special_tokens(["$"])
    with pytest.raises(TokenizerError, match="only a special token"):
        Tokenizer(engine.to_str()).encode("a$")


def test_pickles_into_another_process(tokenizer):
    """Workers cannot get the tokenizer, or get another one."""
    code = (
        "import pickle, sys; t = pickle.load(sys.stdin.buffer); "
        "print(t.fingerprint, t.encode('a <|im_end|>'), t.eos_ids, len(t.chat([{'role': 'user', 'content': 'a'}]).ids))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(tokenizer), capture_output=True, timeout=120, check=True
    )
    ids, chat = tokenizer.encode("a <|im_end|>"), tokenizer.chat([{"role": "user", "content": "a"}])
    assert done.stdout.decode().strip() == f"{tokenizer.fingerprint} {ids} {tokenizer.eos_ids} {len(chat.ids)}"


def test_fingerprint_is_of_the_encoding_alone(tokenizer, tmp_path, texts):
    """Caches are thrown away because of a moved directory or another template, or kept for another vocabulary."""
    tokenizer.save_pretrained(tmp_path / "x")
    again = Tokenizer.from_pretrained(tmp_path / "x")
    text = (tmp_path / "x" / "tokenizer.json").read_text()
    bare = Tokenizer(text)
    assert tokenizer.fingerprint == again.fingerprint == bare.fingerprint
    assert train_bpe(texts, 379).fingerprint != tokenizer.fingerprint
    changed = json.loads(text)
    changed["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    assert Tokenizer(json.dumps(changed)).fingerprint != tokenizer.fingerprint


def test_padding_truncation_and_templates_of_the_file_do_not_act(tokenizer, texts):
    """A tokenizer.json with truncation or a begin token cuts or lengthens what encode returns."""
    engine = reference(tokenizer)
    engine.enable_truncation(2)
    engine.enable_padding()
    engine.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    assert Tokenizer(engine.to_str()).encode(texts[0]) == tokenizer.encode(texts[0])


def test_added_tokens_decode_as_the_library_does(tokenizer):
    """token_bytes and the decoder disagree on added tokens outside the byte alphabet."""
    engine = reference(tokenizer)
    engine.add_tokens(["<think>", "két ü", "日 本"])
    ours = Tokenizer(engine.to_str())
    for text in ("a<think>b", "xkét üy", "日 本 日"):
        ids = ours.encode(text)
        decoder = ours.decoder()
        assert decoder.push(ids) + decoder.flush() == ours.decode(ids) == engine.decode(ids)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda t: t.encode(3), TypeError, "expected a string"),
        (lambda t: t.encode("a\udc80"), TokenizerError, "surrogate"),
        (lambda t: t.encode_batch("abc"), TypeError, "one string"),
        (lambda t: t.encode_batch(["a", None]), TypeError, "expected a string"),
        (lambda t: t.encode_batch(["a", "\ud800"]), TokenizerError, "surrogate"),
        (lambda t: t.decode([0, 380]), TokenizerError, r"\[380\]"),
        (lambda t: t.decode([-1]), TokenizerError, r"\[-1\]"),
        (lambda t: t.token_bytes(380), TokenizerError, r"\[380\]"),
    ],
)
def test_bad_input(tokenizer, call, error, match):
    """Bad input passes silently or breaks somewhere inside the library."""
    with pytest.raises(error, match=match):
        call(tokenizer)


def test_empty_and_numpy_input(tokenizer):
    """Empty input or NumPy ids fail."""
    assert tokenizer.encode("") == tokenizer.encode_batch([]) == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array(tokenizer.encode("to be"), np.int32)) == "to be"


def test_token_bytes_needs_bytes(wordpiece):
    """token_bytes guesses where a vocabulary has no bytes."""
    with pytest.raises(TokenizerError, match="byte-level"):
        wordpiece.token_bytes(1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "Magic"}}', '{"model": 1}', "[" * 100000])
def test_malformed_descriptions(text):
    """A damaged tokenizer.json raises something that is no TokenizerError."""
    with pytest.raises(TokenizerError):
        Tokenizer(text)


def test_the_prefix_of_prompts_is_what_the_post_processor_puts_first(tokenizer):
    """Prompts of models that were trained with a begin token lack it, or texts that need none get one."""
    assert tokenizer.prompt_prefix == ()
    engine = tokenizers.Tokenizer.from_str(json.dumps(tokenizer._spec))
    engine.add_special_tokens(["<|begin|>", "<|close|>"])
    begin, close = (engine.token_to_id(name) for name in ("<|begin|>", "<|close|>"))
    special = [("<|begin|>", begin), ("<|close|>", close)]
    engine.post_processor = processors.TemplateProcessing("<|begin|> $A <|close|>", special_tokens=special)
    templated = Tokenizer(engine.to_str())
    assert templated.prompt_prefix == (begin,)
    assert begin not in templated.encode("x")
