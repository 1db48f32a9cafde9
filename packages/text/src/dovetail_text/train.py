"""Training a byte-level BPE vocabulary."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dovetail_text.errors import TokenizerError
from dovetail_text.template import CHATML
from dovetail_text.tokenizer import Tokenizer

__all__ = ["WORDS", "train_bpe"]

WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What a merge never crosses: a word with the one character before it, up to three digits, punctuation with the line
breaks after it, white space up to a line break, other white space (the rule of OpenAI's cl100k vocabulary)."""

_LOG = logging.getLogger("dovetail_text")


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    chat_template: str | None = CHATML,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the same texts in the same order give the same fingerprint.

    All 256 bytes are in the vocabulary, so that every text can be encoded. Ids are the special tokens, the bytes, then
    the merges. The first special token separates documents; it and ``<|im_end|>``, where given, are the `eos_ids`.
    Where the texts have too few different pairs the vocabulary stays smaller, which is logged.

    Args:
        texts: documents, read once.
        vocab_size: number of ids, special tokens included; at least 256 more than there are special tokens.
        special_tokens: their names; at least one.
        chat_template: a Jinja template for `Tokenizer.chat`; ChatML where the special tokens have its names.
        progress: called after each document with the number of documents and of characters so far.

    Raises:
        TokenizerError: `vocab_size` is too small, a special token is empty or doubled, or the texts hold nothing.
        TypeError: a text is no string.
    """
    _check(vocab_size, special_tokens)
    engine = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(_counted(texts, progress), trainer)
    if engine.get_vocab_size() < vocab_size:
        _LOG.warning("the texts give %d tokens of the %d that were asked for", engine.get_vocab_size(), vocab_size)
    if chat_template is CHATML and not {"<|im_start|>", "<|im_end|>"} <= set(special_tokens):
        chat_template = None
    eos = [special_tokens[0], *(name for name in special_tokens if name == "<|im_end|>")]
    return Tokenizer(
        engine.to_str(), eos_tokens=eos, named={"eos_token": special_tokens[0]}, chat_template=chat_template
    )


def _check(vocab_size: int, special_tokens: Sequence[str]) -> None:
    if isinstance(special_tokens, str) or not special_tokens or not all(special_tokens):
        raise TokenizerError(f"special_tokens is {special_tokens!r}; expected a sequence of at least one name")
    if len(set(special_tokens)) != len(special_tokens):
        raise TokenizerError(f"special_tokens {list(special_tokens)} has a name twice")
    if vocab_size < 256 + len(special_tokens):
        raise TokenizerError(
            f"vocab_size is {vocab_size}; expected at least {256 + len(special_tokens)} "
            f"(256 bytes and {len(special_tokens)} special tokens)"
        )


def _counted(texts: Iterable[str], progress: Callable[[int, int], None] | None) -> Iterator[str]:
    if isinstance(texts, str):
        raise TypeError("texts is one string; expected an iterable of documents, such as [text]")
    documents = characters = 0
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"document {documents} is a {type(text).__name__}; expected a string")
        documents, characters = documents + 1, characters + len(text)
        if progress is not None:
            progress(documents, characters)
        yield text
    if not characters:
        raise TokenizerError(f"the {documents} texts hold no character; a vocabulary needs some to be trained on")
