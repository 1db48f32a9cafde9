"""Tokenizers and sources small enough to be obviously right; importable, so that worker processes find them."""

import dataclasses
import os
import time

import numpy as np

from dovetail_data import TokenSource


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
