"""The files of a Hugging Face directory that describe a tokenizer."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dovetail_text.errors import TokenizerError

__all__ = ["Found", "read", "write"]

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Found(NamedTuple):
    """What the files say.

    Attributes:
        description: the text of ``tokenizer.json``.
        eos_tokens: names of the tokens that end a document or a reply.
        eos_ids: further ids that do (from ``generation_config.json``).
        named: tokens by role, such as ``bos_token``.
        chat_template: the Jinja template, if any.
    """

    description: str
    eos_tokens: tuple[str, ...]
    eos_ids: tuple[int, ...]
    named: dict[str, str]
    chat_template: str | None


def read(path: pathlib.Path) -> Found:
    """Read a directory; see `Tokenizer.from_pretrained` for files and errors."""
    file = path / "tokenizer.json"
    if not file.is_file():
        there = sorted(p.name for p in path.iterdir())[:10] if path.is_dir() else "no directory"
        raise FileNotFoundError(
            f"{file} does not exist (found: {there}); convert older formats once with transformers: "
            "AutoTokenizer.from_pretrained(dir).save_pretrained(dir)"
        )
    config = _object(path / "tokenizer_config.json")
    roles = _object(path / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    named = {name: _name_of(path, name, roles[name]) for name in _NAMES if roles.get(name) is not None}
    eos: list[Any] = [named["eos_token"]] if "eos_token" in named else []
    eos += _list_of(path / "tokenizer_config.json", config, "eos_tokens", str)
    generation = path / "generation_config.json"
    eos_ids = _list_of(generation, _object(generation), "eos_token_id", int)
    return Found(_text(file), tuple(eos), tuple(eos_ids), named, _template(path, config))


def write(path: pathlib.Path, found: Found) -> None:
    """Write a directory; what cannot be done without, ``tokenizer.json``, comes last and so tells that all is there."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    named = dict(found.named)
    if found.eos_tokens:
        named["eos_token"] = found.eos_tokens[0]
        config["eos_tokens"] = list(found.eos_tokens)
    config |= named
    files = {"special_tokens_map.json": _dump(named)}
    if found.chat_template is not None:
        config["chat_template"] = found.chat_template
        files["chat_template.jinja"] = found.chat_template
    files["tokenizer_config.json"] = _dump(config)
    files["tokenizer.json"] = found.description
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        _replace(path / name, text)
    if found.chat_template is None:
        (path / "chat_template.jinja").unlink(missing_ok=True)


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _replace(path: pathlib.Path, text: str) -> None:
    """Write a file so that whoever opens it sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error}") from error


def _object(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; an absent file is an empty object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _name_of(path: pathlib.Path, role: str, value: Any) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise TokenizerError(f"{path}: {role} is {value!r:.60}; expected a string or an object with 'content'")
    return content


def _list_of(path: pathlib.Path, config: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = config.get(key)
    items: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, kind) for item in items):
        raise TokenizerError(f"{path}: {key} is {value!r:.60}; expected {kind.__name__} or a list of them")
    return items


def _template(path: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return _text(path / "chat_template.jinja")
    value = config.get("chat_template")
    if isinstance(value, list):
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{path}: chat_template is {value!r:.60}; expected a string, or a list with a 'default'")
    return value
