"""What a ``tokenizer.json`` says: the parts that decide how text is encoded, and its special tokens."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from dovetail_text.errors import TokenizerError

__all__ = ["build", "continuation", "fingerprint_of", "is_byte_level", "leaks", "parse", "special_pattern"]

Json = dict[str, Any]


def parse(text: str) -> Json:
    """Return the JSON object of a ``tokenizer.json``.

    Raises:
        TokenizerError: it is not JSON, or not the description of a tokenizer.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"tokenizer.json is not valid JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise TokenizerError(f"tokenizer.json starts with {text[:40]!r}; expected an object with a 'model' object")
    return value


def build(spec: Json) -> tokenizers.Tokenizer:
    """Return the Hugging Face tokenizer that encodes plain text: no template, padding, truncation or special tokens.

    Raises:
        TokenizerError: the library does not accept the description.
    """
    bare = spec | {"post_processor": None, "padding": None, "truncation": None}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"tokenizer.json is not one that tokenizers {_version()} reads: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _version() -> str:
    return str(tokenizers.__version__)


def continuation(spec: Json) -> Json:
    """Return the description of a tokenizer for text that follows other text: no space before its first word."""

    def edit(value: Any) -> Any:
        if isinstance(value, Mapping):
            edited = {key: edit(item) for key, item in value.items()}
            return edited | {"prepend_scheme": "never"} if value.get("prepend_scheme") == "first" else edited
        return [edit(item) for item in value] if isinstance(value, list) else value

    return spec | {"pre_tokenizer": edit(spec.get("pre_tokenizer"))}


def fingerprint_of(tokenizer: tokenizers.Tokenizer) -> str:
    """Return the SHA-256 (32 hex digits of it) of what decides how text is encoded."""
    spec = json.loads(tokenizer.to_str())
    model = {key: value for key, value in spec["model"].items() if value not in (None, False)}
    if isinstance(vocab := model.get("vocab"), dict):
        model["vocab"] = sorted(vocab.items(), key=lambda item: (item[1], item[0]))
    parts = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens")} | {"model": model}
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def is_byte_level(spec: Json) -> bool:
    """Whether every token is a sequence of bytes written in the byte-level alphabet."""
    decoder: Any = spec.get("decoder") or {}
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return len(parts) == 1 and parts[0].get("type") == "ByteLevel"


def leaks(spec: Json, specials: Mapping[str, int]) -> frozenset[int]:
    """Return the special ids that the model itself can produce from plain text (its unknown token left out).

    A BPE produces what its merges make and its single characters; other models any entry of their vocabulary.
    """
    model = spec["model"]
    if model.get("type", "BPE") != "BPE" or model.get("ignore_merges") or model.get("continuing_subword_prefix"):
        reachable = set(specials)
    else:
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", []))
        made = {"".join(merge) for merge in merges}
        reachable = {name for name in specials if name in made or len(name) == 1}
    in_model = _model_vocab(model)
    unknown = {model.get("unk_token")} | ({_unigram_unknown(model)} if "unk_id" in model else set())
    return frozenset(specials[name] for name in reachable & in_model - unknown)


def _model_vocab(model: Json) -> set[str]:
    vocab = model.get("vocab", {})
    return set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}


def _unigram_unknown(model: Json) -> str | None:
    vocab, index = model.get("vocab", []), model.get("unk_id")
    return vocab[index][0] if isinstance(vocab, list) and isinstance(index, int) and index < len(vocab) else None


def special_pattern(names: Mapping[str, int]) -> re.Pattern[str] | None:
    """Return the pattern of any special token's name, longer names first; None if there are none."""
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
