"""Tokenizers and sources small enough to be obviously right; importable, so that worker processes find them."""

import dataclasses
import json
import os
import time

import numpy as np

from dovetail_data import TokenSource
from dovetail_protocols import ChatEncoding, RoleSpan


def texts(corpus):
    return [document.text for document in corpus]


def ids(corpus):
    return [document.id for document in corpus]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes as ids; each fault is one way in which a tokenizer can misbehave."""

    fault: str = ""
    vocab_size: int = 257
    eos_ids: tuple = (256,)
    fingerprint: str = "bytes"
    pause: float = 0.0

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        time.sleep(self.pause)
        if self.fault == "raises":
            raise KeyError("no such merge")
        if self.fault == "dies":
            os.kill(os.getpid(), 9)
        if self.fault == "prints":
            os.write(1, b"noise")
        ids = [list(text.encode()) for text in texts]
        if self.fault == "range":
            ids[-1][-1] = self.vocab_size
        if self.fault == "short":
            ids.pop()
        return ids

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def decoder(self):
        raise NotImplementedError

    def chat(self, messages, tools=None, *, add_generation_prompt=False):
        raise ValueError("no chat template")


class NoPickle(Bytes):
    def __reduce__(self):
        raise TypeError("cannot pickle 'lock' object")


class Arrays(TokenSource):
    """Documents of given lengths; the tokens of all documents are 0, 1, 2, ... so each tells where it is from."""

    def __init__(self, lengths, name="arrays"):
        self._lengths = np.asarray(lengths, np.int64)
        self.starts = np.cumsum(self._lengths) - self._lengths
        self.name = name

    @property
    def fingerprint(self):
        return self.name

    @property
    def vocab_size(self):
        return int(self._lengths.sum())

    @property
    def lengths(self):
        return self._lengths

    @property
    def byte_lengths(self):
        return self._lengths * 3

    def gather(self, documents, starts, stops):
        begins = self.starts[documents]
        pieces = [np.arange(b + s, b + e, dtype=np.uint32) for b, s, e in zip(begins, starts, stops, strict=True)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)

    def origin(self, document):
        return f"doc{document}"


EOS, BOS = 256, 257
HEADS = {"system": 258, "user": 259, "assistant": 260, "tool": 261}


class Chat:
    """A template like ChatML over bytes: head, text, calls in brackets, end token, line break."""

    vocab_size, eos_ids, fingerprint = 262, (EOS,), "chat"

    def __init__(self, drops_thoughts=False):
        self.drops_thoughts = drops_thoughts

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]

    def chat(self, messages, tools=None, *, add_generation_prompt=False):
        ids, spans = [BOS], []
        if tools:
            ids += list(json.dumps(tools).encode())
        for place, message in enumerate(messages):
            if message["role"] not in HEADS:
                raise ValueError(f"role {message['role']!r}")
            text = message.get("content", "")
            if self.drops_thoughts and place < len(messages) - 1:
                text = text.removeprefix("hm... ")
            ids.append(HEADS[message["role"]])
            spans.append(
                RoleSpan(message["role"], len(ids), len(ids) + len(text.encode()))
                if text
                else RoleSpan(message["role"], 0, 0)
            )
            ids += list(text.encode())
            ids += list(json.dumps(message["tool_calls"]).encode()) if "tool_calls" in message else []
            ids += [EOS, 10]
        return ChatEncoding(ids + [HEADS["assistant"]] * add_generation_prompt, tuple(spans))


class PlainChat(Chat):
    """The same vocabulary for plain text."""

    fingerprint = "plain"
