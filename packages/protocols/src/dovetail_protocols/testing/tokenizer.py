"""Kit of `Tokenizer`: text and ids and back, never half a character, content never taken for template."""

from collections.abc import Sequence

from dovetail_protocols.testing._rules import require
from dovetail_protocols.tokenizer import Message, Tokenizer

__all__ = ["SPECIAL_TEXTS", "TEXTS", "check_tokenizer"]

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\tand a tab \r\n",
    "def f(x):\n    return x + 1  # 0123456789\n",
    "naïve café, Grüße, привет, 你好世界, ✓ 👩‍🚀🇩🇪 e\u0301 \u00a0 ﷽",
    "a" * 100,
)
SPECIAL_TEXTS = ("<|endoftext|>", "</s>", "<s>", "<|im_start|>user", "<|im_end|>", "<|eot_id|>", "<bos>", "[INST]")
MESSAGES = (
    Message(role="user", content="What is 1+1? <|im_end|> 👩‍🚀"),
    Message(role="assistant", content="It is 2, naïvely."),
    Message(role="user", content="Thanks </s>!"),
)


def check_tokenizer(
    tokenizer: Tokenizer,
    *,
    texts: Sequence[str] = TEXTS,
    special_texts: Sequence[str] = SPECIAL_TEXTS,
    lossless: bool = True,
    chat: bool = True,
    twin: Tokenizer | None = None,
) -> None:
    """Check a tokenizer.

    Args:
        tokenizer: the tokenizer.
        texts: texts to encode.
        special_texts: how its special tokens are written; in content they are ordinary text.
        lossless: whether every text comes back exactly, as byte-level tokenizers promise; otherwise what comes back
            must only come back the same a second time.
        chat: whether it has a chat template (its messages must not change their content).
        twin: the same tokenizer loaded again; its fingerprint must agree.

    Raises:
        ConformanceError: a rule is broken.
    """
    _check_properties(tokenizer, twin)
    everything = [*texts, *special_texts, *(f"say {text} twice{text}" for text in special_texts)]
    for text in everything:
        _check_text(tokenizer, text, lossless=lossless)
        _check_decoder(tokenizer, tokenizer.encode(text))
    batch = tokenizer.encode_batch(everything)
    expected = [tokenizer.encode(text) for text in everything]
    require(batch == expected, "Tokenizer: encode_batch is encode of each text", got=batch, expected=expected)
    require(tokenizer.encode_batch([]) == [], "Tokenizer: encode_batch of nothing is an empty list")
    _check_prompt_text(tokenizer)
    _check_independent(tokenizer)
    if chat:
        _check_chat(tokenizer, MESSAGES)


def _check_properties(tokenizer: Tokenizer, twin: Tokenizer | None) -> None:
    size, ends, mark = tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.fingerprint
    require(isinstance(size, int) and size > 0, "Tokenizer: vocab_size is a positive int", vocab_size=size)
    good = isinstance(ends, tuple) and ends and all(0 <= end < size for end in ends)
    require(good, "Tokenizer: eos_ids is a tuple of at least one id below vocab_size", eos_ids=ends, vocab_size=size)
    good = isinstance(mark, str) and mark and tokenizer.fingerprint == mark
    require(good, "Tokenizer: the fingerprint is a constant string that is not empty", fingerprint=mark)
    if twin is not None:
        rule = "Tokenizer: tokenizers that encode alike have equal fingerprints"
        require(twin.fingerprint == mark, rule, fingerprint=mark, twin=twin.fingerprint)


def _check_text(tokenizer: Tokenizer, text: str, *, lossless: bool) -> None:
    ids = tokenizer.encode(text)
    good = isinstance(ids, list) and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    require(good, "Tokenizer: encode gives a list of ints below vocab_size", text=text, ids=ids)
    require(text or not ids, "Tokenizer: the empty text has no tokens: encode adds no special ones", ids=ids)
    special = [i for i in ids if i in tokenizer.eos_ids]
    rule = "Tokenizer: encode neither adds special tokens nor recognises them in a text"
    require(not special, rule, text=text, ids=ids, eos_ids=tokenizer.eos_ids)
    back = tokenizer.decode(ids)
    wanted = text if lossless else tokenizer.decode(tokenizer.encode(back))
    require(back == wanted, "Tokenizer: decode(encode(text)) is the text", text=text, back=back, expected=wanted)
    ended = tokenizer.decode([*ids, tokenizer.eos_ids[0]])
    require(ended == back, "Tokenizer: decode leaves special tokens out", text=back, with_eos=ended)


def _check_decoder(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    text = tokenizer.decode(ids)
    if "\ufffd" in text:
        return
    for chunk in (1, 2, 3):
        decoder, pushed = tokenizer.decoder(), ""
        for start in range(0, len(ids), chunk):
            pushed += decoder.push(ids[start : start + chunk])
            rule = "IncrementalDecoder: what is pushed out is a part of the text, never half a character"
            require(text.startswith(pushed), rule, pushed=pushed, text=text, chunk=chunk)
        rest = decoder.flush()
        rule = "IncrementalDecoder: all that came out, flush included, is decode(ids)"
        require(pushed + rest == text, rule, pushed=pushed, flushed=rest, text=text, chunk=chunk)
    _check_truncated(tokenizer, ids, text)


def _check_truncated(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> None:
    for length in range(len(ids)):
        decoder = tokenizer.decoder()
        shown = decoder.push(ids[:length]) + decoder.flush()
        rule = "IncrementalDecoder: a text cut short is its beginning, undecodable bytes as U+FFFD"
        require(text.startswith(shown.rstrip("\ufffd")), rule, shown=shown, text=text, ids=length)
        whole = tokenizer.decode(ids[:length])
        same = shown.rstrip("\ufffd") == whole.rstrip("\ufffd")
        require(same, rule, shown=shown, decoded=whole, ids=length)


def _check_prompt_text(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 4
    ids, decoder = tokenizer.encode(text), tokenizer.decoder()
    pushed = "".join(decoder.push([i]) for i in ids)
    rule = "IncrementalDecoder: text is given out as soon as it is certain"
    require(len(pushed) >= len(text) // 2, rule, pushed=pushed, text=text)


def _check_independent(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é👩‍🚀")
    for cut in range(len(ids)):
        tokenizer.decoder().push(ids[:cut])
        fresh = tokenizer.decoder()
        text = fresh.push(ids) + fresh.flush()
        rule = "Tokenizer: each decoder is fresh, whatever another holds back"
        require(text == tokenizer.decode(ids), rule, text=text, expected=tokenizer.decode(ids))


def _check_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    encoding = tokenizer.chat(messages)
    ids, spans = encoding.ids, encoding.spans
    rule = "Tokenizer: chat gives one span per message, in order, with the message's role"
    roles = [message.get("role") for message in messages]
    require([span.role for span in spans] == roles, rule, spans=spans, roles=roles)
    last = 0
    for span, message in zip(spans, messages, strict=True):
        good = last <= span.start <= span.stop <= len(ids)
        require(good, "Tokenizer: spans are half-open, ascending and inside the ids", spans=spans, ids=len(ids))
        last = span.stop
        text, content = tokenizer.decode(ids[span.start : span.stop]), message.get("content", "")
        rule = "Tokenizer: a span holds the message's own text, all of it and nothing else"
        require(text.strip() == content, rule, span=span, text=text, content=content)
    prompt = tokenizer.chat(messages, add_generation_prompt=True)
    begins = prompt.ids[: len(ids)] == ids and len(prompt.ids) >= len(ids)
    require(begins, "Tokenizer: the generation prompt is added after the messages", ids=ids, with_prompt=prompt.ids)
    require(prompt.spans == spans, "Tokenizer: the generation prompt belongs to no span", spans=prompt.spans)
