"""Deltas and completions of the engine as answers of the OpenAI API, one class for each kind of request."""

import hashlib
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from dovetail_protocols import Completion, Delta, Tokenizer, TokenLogprob
from dovetail_serve import schema
from dovetail_serve.calls import Call
from dovetail_serve.tokens import TokenTexts, ranked

__all__ = ["DONE", "ChatFormat", "CompletionFormat", "Format", "event", "fingerprint"]

DONE = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()


def event(answer: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + _ENCODER.encode(answer) + b"\n\n"


def fingerprint(tokenizer: Tokenizer, version: int) -> str:
    """Return the `system_fingerprint`: what besides the request decides a reply with a seed."""
    digest = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=5).hexdigest()
    return f"fp_{digest}_v{version}"


class Format(Protocol):
    """Writes the answers to one request."""

    id: str

    def chunks(self, index: int, delta: Delta) -> bytes:
        """Return the events for a delta of a reply, none for a delta that shows nothing."""
        ...

    def last(self, usage: schema.Usage) -> bytes:
        """Return the events after all replies."""
        ...

    def whole(self, replies: Sequence[Completion], usage: schema.Usage) -> bytes:
        """Return the answer that is not streamed."""
        ...


class _Format:
    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(self, call: Call, tokenizer: Tokenizer, texts: TokenTexts) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.call, self.tokenizer, self.texts = call, tokenizer, texts
        self.created = int(time.time())
        self._version = 0
        self._prints: dict[int, str] = {}

    def answer(self, kind: str, version: int, choices: Any, usage: Any = msgspec.UNSET) -> schema.Answer:
        """Return an answer with the fields that all kinds share."""
        self._version = version
        if version not in self._prints:
            self._prints[version] = fingerprint(self.tokenizer, version)
        return schema.Answer(self.id, kind, self.created, self.call.model, self._prints[version], choices, usage)

    def chunk(self, version: int, choices: Any) -> bytes:
        """Return the event of one chunk; its usage is null when the last one has it."""
        usage = None if self.call.include_usage else msgspec.UNSET
        return event(self.answer(self.chunk_kind, version, choices, usage))

    def last(self, usage: schema.Usage) -> bytes:
        """Return the events after all replies: the usage if it was asked for, and the end mark."""
        if not self.call.include_usage:
            return DONE
        return event(self.answer(self.chunk_kind, self._version, [], usage)) + DONE


def _version(replies: Sequence[Completion]) -> int:
    return max((reply.versions[-1] for reply in replies if reply.versions), default=0)


class CompletionFormat(_Format):
    """Answers of ``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, call: Call, tokenizer: Tokenizer, texts: TokenTexts) -> None:
        super().__init__(call, tokenizer, texts)
        self.echoes: Sequence[str] = [""] * call.replies
        self._offsets = [_Offsets(tokenizer) for _ in range(call.replies if call.logprobs is not None else 0)]
        self._begun: set[int] = set()

    def chunks(self, index: int, delta: Delta) -> bytes:
        """Return the event for a delta; the first one of a reply begins with the echo."""
        echo = "" if index in self._begun else self.echoes[index]
        if not (delta.text or echo or delta.finish_reason or delta.logprobs):
            return b""
        self._begun.add(index)
        choice = self._choice(index, echo + delta.text, delta.token_ids, delta.logprobs, delta.finish_reason)
        return self.chunk(delta.version, [choice])

    def whole(self, replies: Sequence[Completion], usage: schema.Usage) -> bytes:
        """Return the answer that is not streamed."""
        choices = [
            self._choice(i, self.echoes[i] + reply.text, reply.token_ids, reply.logprobs, reply.finish_reason)
            for i, reply in enumerate(replies)
        ]
        return _ENCODER.encode(self.answer(self.kind, _version(replies), choices, usage))

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
    ) -> schema.CompletionChoice:
        shown = None if logprobs is None else self._logprobs(tokens, logprobs, self._offsets[index])
        return schema.CompletionChoice(index, text, shown, finish_reason)

    def _logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], offsets: "_Offsets"
    ) -> schema.CompletionLogprobs:
        found = schema.CompletionLogprobs([], [], [], [])
        for token, logprob in zip(tokens, logprobs, strict=True):
            chosen, best = ranked(token, logprob, self.call.logprobs or 0)
            found.tokens.append(self.texts.show(token).text)
            found.token_logprobs.append(chosen.value)
            likely: dict[str, float] = {}
            for other, value in [*best, chosen]:
                likely.setdefault(self.texts.show(other).text, value)
            found.top_logprobs.append(likely)
            found.text_offset.append(offsets.push(token))
        return found


class _Offsets:
    """Where in the text each token begins; the tokens of one character all begin where it does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder, self._place = tokenizer.decoder(), 0

    def push(self, token: int) -> int:
        place = self._place
        self._place += len(self._decoder.push([token]))
        return place


class ChatFormat(_Format):
    """Answers of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, call: Call, tokenizer: Tokenizer, texts: TokenTexts) -> None:
        super().__init__(call, tokenizer, texts)
        self._begun: set[int] = set()

    def chunks(self, index: int, delta: Delta) -> bytes:
        """Return the events for a delta: the role first, then text, then an empty one with the finish reason."""
        out = b""
        if index not in self._begun:
            self._begun.add(index)
            out = self._event(index, delta, schema.ChatDelta(role="assistant", content=""))
        if delta.text or delta.logprobs:
            logprobs = self._logprobs(delta.token_ids, delta.logprobs)
            out += self._event(index, delta, schema.ChatDelta(content=delta.text), logprobs)
        if delta.finish_reason is not None:
            out += self._event(index, delta, schema.ChatDelta(), finish_reason=delta.finish_reason)
        return out

    def _event(
        self,
        index: int,
        delta: Delta,
        content: schema.ChatDelta,
        logprobs: schema.ChatLogprobs | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        return self.chunk(delta.version, [schema.ChatChunkChoice(index, content, logprobs, finish_reason)])

    def whole(self, replies: Sequence[Completion], usage: schema.Usage) -> bytes:
        """Return the answer that is not streamed."""
        choices = [
            schema.ChatChoice(
                i, schema.ChatMessage(reply.text), self._logprobs(reply.token_ids, reply.logprobs), reply.finish_reason
            )
            for i, reply in enumerate(replies)
        ]
        return _ENCODER.encode(self.answer(self.kind, _version(replies), choices, usage))

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> schema.ChatLogprobs | None:
        if logprobs is None:
            return None
        pairs = zip(tokens, logprobs, strict=True)
        return schema.ChatLogprobs([self._token(token, logprob) for token, logprob in pairs])

    def _token(self, token: int, logprob: TokenLogprob) -> schema.ChatToken:
        chosen, best = ranked(token, logprob, self.call.logprobs or 0)
        top = [schema.TopToken(*self._entry(other, value)) for other, value in best]
        return schema.ChatToken(*self._entry(token, chosen.value), top)

    def _entry(self, token: int, value: float) -> tuple[str, float, list[int] | None]:
        shown = self.texts.show(token)
        return shown.text, value, shown.data
