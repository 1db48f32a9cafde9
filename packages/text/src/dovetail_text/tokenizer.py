"""The tokenizer: text and conversations to ids and back."""

import bisect
import datetime
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from dovetail_protocols import ChatEncoding, IncrementalDecoder, Message, RoleSpan
from dovetail_text import files, spec
from dovetail_text.chat import Rendered, render_chat
from dovetail_text.decoding import ByteDecoder, WindowDecoder, byte_of_symbol
from dovetail_text.errors import ChatError, TokenizerError

__all__ = ["Tokenizer"]


class Tokenizer:
    """A Hugging Face tokenizer behind `dovetail_protocols.Tokenizer`.

    Text is data: a special token's name inside it (``"<|im_end|>"`` in a user's message) is encoded as the characters
    that it consists of, and never as the special token. Only `chat` produces special tokens, where the template
    itself writes them. Instances are immutable and can be pickled; what workers load is equal.

    Args:
        description: the text of a ``tokenizer.json``.
        eos_tokens: names of the tokens that end a document or a reply; the first separates documents.
        named: the tokens that a template may use by name, such as ``{"bos_token": "<s>"}``.
        chat_template: a Jinja template as Hugging Face writes it.

    Raises:
        TokenizerError: the description is malformed, or a named token is not in the vocabulary.

    >>> from dovetail_text import train_bpe
    >>> tokenizer = train_bpe(["to be or not to be"], 300)
    >>> tokenizer.decode(tokenizer.encode("not to be"))
    'not to be'
    """

    def __init__(
        self,
        description: str,
        *,
        eos_tokens: Sequence[str] = (),
        named: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._named = dict(named or {})
        self._eos_tokens = tuple(dict.fromkeys(eos_tokens))
        self._chat_template = chat_template
        self._spec = spec.parse(description)
        self._plain = spec.build(self._spec)
        self._vocab = self._plain.get_vocab(with_added_tokens=True)
        self._mark_named_as_special()
        flags = self._plain.get_added_tokens_decoder()
        self._added = {token.content: token for _, token in sorted(flags.items()) if token.special}
        self._special = {name: self._vocab[name] for name in self._added}
        self._special_ids = frozenset(self._special.values())
        self._leaks = spec.leaks(self._spec, self._special)

    def _mark_named_as_special(self) -> None:
        for role, name in (*self._named.items(), *(("eos", name) for name in self._eos_tokens)):
            if name not in self._vocab:
                raise TokenizerError(f"{role} is {name!r}, which is not in the vocabulary of {len(self._vocab)} tokens")
        known = {token.content for token in self._plain.get_added_tokens_decoder().values() if token.special}
        new = [name for name in dict.fromkeys((*self._named.values(), *self._eos_tokens)) if name not in known]
        if new:
            self._plain.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in new])
            added = json.loads(self._plain.to_str())["added_tokens"]
            self._spec = self._spec | {"added_tokens": added}

    def __getstate__(self) -> dict[str, Any]:
        return {
            "description": json.dumps(self._spec),
            "eos_tokens": self._eos_tokens,
            "named": self._named,
            "chat_template": self._chat_template,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("description"), **state)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos={list(self._eos_tokens)}, fingerprint={self.fingerprint})"

    @classmethod
    def from_pretrained(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Read a Hugging Face directory: ``tokenizer.json`` and what stands beside it.

        Read are ``tokenizer_config.json``, ``special_tokens_map.json``, ``chat_template.jinja`` (which goes before the
        template in the configuration) and ``generation_config.json`` (for further ids that end a reply), if present.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json``.
            TokenizerError: a file is malformed.
        """
        found = files.read(pathlib.Path(path))
        eos = list(found.eos_tokens)
        if found.eos_ids:
            names = {index: name for name, index in cls(found.description).vocab().items()}
            eos += [names[index] for index in found.eos_ids if index in names]
        return cls(found.description, eos_tokens=eos, named=found.named, chat_template=found.chat_template)

    def save_pretrained(self, path: str | pathlib.Path) -> None:
        """Write a directory that `from_pretrained` and transformers' ``AutoTokenizer`` read.

        Each file appears whole, ``tokenizer.json`` after the others: a new directory that has it is complete.

        Raises:
            OSError: the directory cannot be written.
        """
        files.write(
            pathlib.Path(path),
            files.Found(json.dumps(self._spec), self._eos_tokens, (), self._named, self._chat_template),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._size

    @functools.cached_property
    def _size(self) -> int:
        return max(self._vocab.values(), default=-1) + 1

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a document or a reply; the first one separates documents."""
        return tuple(self._vocab[name] for name in self._eos_tokens)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a document, or None where the tokenizer names none."""
        name = self._named.get("bos_token")
        return None if name is None else self._vocab[name]

    @functools.cached_property
    def prompt_prefix(self) -> tuple[int, ...]:
        """The special ids that the tokenizer's own post-processor puts before a text, such as a begin token.

        `encode` never adds them: training data and chat templates place their own. A plain prompt that continues like
        the model's training texts begins with them, as transformers does by default.
        """
        encoding = tokenizers.Tokenizer.from_str(json.dumps(self._spec)).encode("x", add_special_tokens=True)
        special = itertools.takewhile(
            lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        )
        return tuple(index for index, _ in special)

    @property
    def fingerprint(self) -> str:
        """A digest of what decides how text is encoded; file locations and chat templates do not enter."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return spec.fingerprint_of(self._plain)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of `chat`."""
        return self._chat_template

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return dict(self._special)

    def vocab(self) -> dict[str, int]:
        """Return every token, written as in the file, and its id."""
        return dict(self._vocab)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens neither added nor recognised in it.

        Raises:
            TypeError: `text` is no string.
            TokenizerError: `text` holds lone surrogates, which no UTF-8 text has.
        """
        return self._ids(self._plain, text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, on all cores."""
        if isinstance(texts, str):
            raise TypeError("texts is one string; expected a sequence of strings, use encode for one")
        for text in texts:
            _check_text(text)
        if self._leaks:
            return [self.encode(text) for text in texts]
        batch = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def _ids(self, engine: tokenizers.Tokenizer, text: str) -> list[int]:
        return [i for i, _ in self._pieces(engine, text)] if self._leaks else _run(engine, text).ids

    def _pieces(self, engine: tokenizers.Tokenizer, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Return ids and the characters they cover; a special id that the model made is made from smaller parts."""
        encoding = _run(engine, text)
        pairs = list(zip(encoding.ids, encoding.offsets, strict=True))
        bad = next((span for i, span in pairs if i in self._leaks), None) if self._leaks else None
        if bad is None:
            return pairs
        middle = (bad[0] + bad[1]) // 2
        if not bad[0] < middle < bad[1]:
            raise TokenizerError(
                f"the vocabulary has only a special token for the text {text[bad[0] : bad[1]]!r}, so that it cannot be "
                "encoded as data; remove it from the text"
            )
        rest = self._pieces(self._continuation, text[middle:])
        return self._pieces(engine, text[:middle]) + [(i, (a + middle, b + middle)) for i, (a, b) in rest]

    @functools.cached_property
    def _continuation(self) -> tokenizers.Tokenizer:
        changed = spec.continuation(self._spec)
        return self._plain if changed == self._spec else spec.build(changed)

    def _known(self, ids: Sequence[int]) -> list[int]:
        numbers = [int(i) for i in ids]
        unknown = [i for i in numbers if i not in self._names]
        if unknown:
            raise TokenizerError(f"unknown ids {unknown[:5]}; the vocabulary's ids are below {self.vocab_size}")
        return numbers

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return {index: name for name, index in self._vocab.items()}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens are left out, undecodable bytes become U+FFFD.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        return self._plain.decode(self._known(ids), skip_special_tokens=True)

    def token_bytes(self, index: int) -> bytes:
        """Return the bytes that an id stands for (for a special token those of its name).

        Raises:
            TokenizerError: the id is unknown, or the vocabulary is not byte-level: what a token stands for then
                depends on its neighbours.
        """
        if not spec.is_byte_level(self._spec):
            raise TokenizerError("token_bytes needs a byte-level vocabulary; use decoder() instead")
        name = self._names[self._known([index])[0]]
        symbols = _symbols()
        is_bytes = all(char in symbols for char in name) and name not in self._added
        return bytes(symbols[char] for char in name) if is_bytes else name.encode()

    def decoder(self) -> IncrementalDecoder:
        """Return a fresh incremental decoder; all its pieces together are `decode` of all its ids."""
        if spec.is_byte_level(self._spec):
            return ByteDecoder(self.token_bytes, self._special_ids)
        return WindowDecoder(self.decode, lambda index: self._names[self._known([index])[0]], self._special_ids)

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> ChatEncoding:
        """Return a conversation's ids and where each message stands in them.

        The ids are those of the whole rendered text, with special tokens where the template writes them and nowhere
        else. A message's span is the tokens that hold at least one character of its content; a token that straddles
        the border to the template's text (rare: templates end their part with a line break or a special token)
        belongs to it. A message that is empty or left out by the template has the empty span ``(0, 0)``. What the
        template writes for tool calls belongs to no span.

        Raises:
            ChatError: there is no template, the template refuses the messages, or it rewrites a message.
        """
        checked = _checked(messages)
        rendered = render_chat(
            functools.partial(self._render, add_generation_prompt, datetime.datetime.now()),
            checked,
            None if tools is None else list(tools),
            spec.special_pattern(self._special),
        )
        pieces = list(self._segments(rendered))
        starts = [span[0] for _, span in pieces]
        stops = [span[1] for _, span in pieces]

        def tokens_of(start: int, stop: int) -> tuple[int, int]:
            return (bisect.bisect_right(stops, start), bisect.bisect_left(starts, stop)) if stop > start else (0, 0)

        spans = [RoleSpan(m["role"], *tokens_of(*r)) for m, r in zip(checked, rendered.ranges, strict=True)]
        return ChatEncoding([i for i, _ in pieces], tuple(spans))

    def _render(self, prompt: bool, now: datetime.datetime, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        return self._template(
            now=now, messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._named
        )

    @functools.cached_property
    def _template(self) -> Any:
        if self._chat_template is None:
            raise ChatError("the tokenizer has no chat template; pass chat_template=dovetail_text.CHATML, or another")
        from dovetail_text.template import compile_template

        return compile_template(self._chat_template)

    def _segments(self, rendered: Rendered) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield the ids of a rendered conversation with the characters they cover."""
        text, begin = rendered.text, 0
        for start, stop, index in (*self._template_specials(rendered), (len(text), len(text), -1)):
            if start > begin:
                engine = self._continuation if begin else self._plain
                _check_text(text[begin:start])
                for i, (a, b) in self._pieces(engine, text[begin:start]):
                    yield i, (a + begin, b + begin)
            if index >= 0:
                yield index, (start, stop)
            begin = stop

    def _template_specials(self, rendered: Rendered) -> Iterator[tuple[int, int, int]]:
        """Yield start, stop and id of the special tokens that the template itself wrote."""
        text, begin = rendered.text, 0
        pattern = spec.special_pattern(self._special)
        if pattern is None:
            return
        for low, high in _gaps(rendered.ranges, len(text)):
            for match in pattern.finditer(text, low, high):
                start, stop = match.span()
                if start < begin or any(at in rendered.breaks for at in range(start + 1, stop)):
                    continue
                token = self._added[match[0]]
                while token.rstrip and stop < len(text) and text[stop].isspace():
                    stop += 1
                while token.lstrip and start > begin and text[start - 1].isspace():
                    start -= 1
                yield start, stop, self._special[match[0]]
                begin = stop


@functools.lru_cache(maxsize=1)
def _symbols() -> dict[str, int]:
    return byte_of_symbol()


def _gaps(ranges: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches that no range covers."""
    begin = 0
    for start, stop in (*sorted(r for r in ranges if r[1] > r[0]), (length, length)):
        if start > begin:
            yield begin, start
        begin = max(begin, stop)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text is {text!r:.60} of type {type(text).__name__}; expected a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text has a lone surrogate {text[error.start]!r} at {error.start}; decode its bytes with "
                "errors='replace' before encoding"
            ) from error


def _run(engine: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    _check_text(text)
    return engine.encode(text, add_special_tokens=False)


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Return the messages as plain dictionaries."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ChatError(f"messages is {messages!r:.60}; expected a non-empty list of {{'role': ..., 'content': ...}}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {i} is {message!r:.60}; expected a mapping with a string 'role'")
        if not isinstance(message.get("content"), str | None):
            raise ChatError(f"message {i} has the content {message['content']!r:.60}; expected a string")
    return [dict(message) for message in messages]
