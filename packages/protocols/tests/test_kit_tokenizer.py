"""The tokenizer kit accepts a byte tokenizer and rejects each named broken one."""

import codecs

import pytest

from dovetail_protocols import ChatEncoding, IncrementalDecoder, RoleSpan, Tokenizer
from dovetail_protocols.testing import ConformanceError, check_tokenizer

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


class GoodDecoder:
    def __init__(self):
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids):
        return self.utf8.decode(bytes(i for i in ids if i < 256))

    def flush(self):
        return self.utf8.decode(b"", final=True)


class Good:
    """Bytes as tokens, with two-byte tokens for a few frequent pairs so that tokens cross characters."""

    vocab_size = 259
    eos_ids = (256, 258)
    fingerprint = "bytes"

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def decoder(self):
        return GoodDecoder()

    def chat(self, messages, tools=None, *, add_generation_prompt=False):
        ids, spans = [], []
        for message in messages:
            ids += [257, *self.encode(message["role"] + "\n")]
            start = len(ids)
            ids += self.encode(message["content"])
            spans.append(RoleSpan(message["role"], start, len(ids)))
            ids += [258, *self.encode("\n")]
        return ChatEncoding(ids + self.prompt() * add_generation_prompt, tuple(spans))

    def prompt(self):
        return [257, *self.encode("assistant\n")]


class EmitsHalfACharacter(Good):
    def decoder(self):
        class Half(GoodDecoder):
            def push(self, ids):
                return bytes(ids).decode("utf-8", "replace")

        return Half()


class DropsHalfACharacter(Good):
    def decoder(self):
        class Half(GoodDecoder):
            def push(self, ids):
                return bytes(ids).decode("utf-8", "ignore")

        return Half()


class HoldsEverythingBack(Good):
    def decoder(self):
        class Late(GoodDecoder):
            def __init__(self):
                self.ids = b""

            def push(self, ids):
                self.ids += bytes(ids)
                return ""

            def flush(self):
                return self.ids.decode("utf-8", "replace")

        return Late()


class SharesOneDecoder(Good):
    def __init__(self):
        self.one = GoodDecoder()

    def decoder(self):
        return self.one


class FlushForgets(Good):
    def decoder(self):
        class Forgets(GoodDecoder):
            def __init__(self):
                self.held = ""

            def push(self, ids):
                text = self.held + bytes(ids).decode("utf-8", "ignore")
                self.held, text = text[-1:], text[:-1]
                return text

            def flush(self):
                return ""

        return Forgets()


class RecognisesSpecialsInContent(Good):
    def encode(self, text):
        for special, token in SPECIAL.items():
            if special in text:
                head, tail = text.split(special, 1)
                return [*self.encode(head), token, *self.encode(tail)]
        return super().encode(text)


class AddsABeginningToken(Good):
    def encode(self, text):
        return [256, *super().encode(text)]


class ShowsSpecials(Good):
    def decode(self, ids):
        return super().decode(ids) + "<|endoftext|>" * (256 in ids)


class Strips(Good):
    def encode(self, text):
        return super().encode(text.strip())


class BatchPads(Good):
    def encode_batch(self, texts):
        rows = super().encode_batch(texts)
        width = max(map(len, rows), default=0)
        return [row + [0] * (width - len(row)) for row in rows]


class VocabTooSmall(Good):
    vocab_size = 120
    eos_ids = (0,)


class NoEnd(Good):
    eos_ids = ()


class EndOutsideVocab(Good):
    eos_ids = (259,)


class FingerprintPerInstance(Good):
    @property
    def fingerprint(self):
        return str(id(self))


class SpansIncludeTheHeader(Good):
    def chat(self, *args, **kwargs):
        ids, spans = super().chat(*args, **kwargs)
        return ChatEncoding(ids, tuple(RoleSpan(s.role, s.start - len(s.role) - 2, s.stop) for s in spans))


class SpansMissTheLastToken(Good):
    def chat(self, *args, **kwargs):
        ids, spans = super().chat(*args, **kwargs)
        return ChatEncoding(ids, tuple(s._replace(stop=s.stop - 1) for s in spans))


class OnlyAssistantSpans(Good):
    def chat(self, *args, **kwargs):
        ids, spans = super().chat(*args, **kwargs)
        return ChatEncoding(ids, tuple(s for s in spans if s.role == "assistant"))


class ChatRecognisesSpecials(Good):
    def chat(self, messages, tools=None, **kwargs):
        cleaned = [{**m, "content": m["content"].replace("<|im_end|>", "")} for m in messages]
        return super().chat(cleaned, tools, **kwargs)


class PromptAlways(Good):
    def chat(self, messages, tools=None, *, add_generation_prompt=False):
        ids, spans = super().chat(messages, tools, add_generation_prompt=True)
        return ChatEncoding(ids if add_generation_prompt else [*ids, 10], spans)


class PromptHasASpan(Good):
    def chat(self, messages, tools=None, *, add_generation_prompt=False):
        ids, spans = super().chat(messages, tools, add_generation_prompt=add_generation_prompt)
        return ChatEncoding(
            ids, (*spans, RoleSpan("assistant", len(ids), len(ids))) if add_generation_prompt else spans
        )


MUTANTS = [
    EmitsHalfACharacter,
    DropsHalfACharacter,
    HoldsEverythingBack,
    SharesOneDecoder,
    FlushForgets,
    RecognisesSpecialsInContent,
    AddsABeginningToken,
    ShowsSpecials,
    Strips,
    BatchPads,
    VocabTooSmall,
    NoEnd,
    EndOutsideVocab,
    FingerprintPerInstance,
    SpansIncludeTheHeader,
    SpansMissTheLastToken,
    OnlyAssistantSpans,
    ChatRecognisesSpecials,
    PromptAlways,
    PromptHasASpan,
]


def test_a_good_tokenizer_passes():
    assert isinstance(Good(), Tokenizer)
    assert isinstance(Good().decoder(), IncrementalDecoder)
    check_tokenizer(Good(), twin=Good())


def test_a_tokenizer_that_normalises_passes_as_lossy():
    class Lower(Good):
        def encode(self, text):
            return super().encode(text.lower())

    with pytest.raises(ConformanceError, match="decode"):
        check_tokenizer(Lower(), chat=False)
    check_tokenizer(Lower(), lossless=False, chat=False)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda kind: kind.__name__)
def test_broken_tokenizers_are_rejected(mutant):
    kept = mutant()
    with pytest.raises(ConformanceError, match=r"Tokenizer: |IncrementalDecoder: "):
        check_tokenizer(kept, twin=mutant())
