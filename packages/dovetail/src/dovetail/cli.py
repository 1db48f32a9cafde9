"""The command line: offers what is installed, over the entry-point group ``dovetail.commands``.

A command is a frozen dataclass with `run` (`dovetail_protocols.Command`); its flags, its help and its ``--config``
file all come from the dataclass. Only the module of the chosen command is imported.
"""

import difflib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dovetail.config import ConfigError, load

__all__ = ["commands", "main"]

GROUP = "dovetail.commands"


def commands() -> dict[tuple[str, ...], importlib.metadata.EntryPoint]:
    """Return the installed commands by their words: ``("checkpoint", "ls")``."""
    found = importlib.metadata.entry_points(group=GROUP)
    return {tuple(point.name.split(".")): point for point in sorted(found, key=lambda p: p.name)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, what the command says, or 2 for an error of the user's."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _dispatch(words: list[str]) -> int:
    known = commands()
    if not words or words[0] in ("-h", "--help"):
        print(_overview(known))
        return 0
    if words[0] == "--version":
        words = ["version"]
    name = max((n for n in known if tuple(words[: len(n)]) == n), key=len, default=None)
    if name is None:
        return _unknown(words, known)
    return _run(name, known[name], words[len(name) :])


def _overview(known: dict[tuple[str, ...], importlib.metadata.EntryPoint]) -> str:
    width = max(len(" ".join(name)) for name in known)
    rows = [f"  {' '.join(name):{width}}  {_summary(point)}" for name, point in known.items()]
    return "\n".join(["usage: dovetail COMMAND [OPTIONS]   (dovetail COMMAND --help explains one)", "", *rows])


def _summary(point: importlib.metadata.EntryPoint) -> str:
    return (point.load().__doc__ or "").strip().splitlines()[0]


def _unknown(words: list[str], known: dict[tuple[str, ...], importlib.metadata.EntryPoint]) -> int:
    same = {" ".join(n): p for n, p in known.items() if n[0] == words[0]}
    if same:
        print(_overview({tuple(n.split()): p for n, p in same.items()}))
        return 0 if words[1:] in ([], ["--help"], ["-h"]) else 2
    near = difflib.get_close_matches(words[0], [" ".join(n) for n in known], n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    print(f"error: unknown command {words[0]!r}{hint}\n\n{_overview(known)}", file=sys.stderr)
    return 2


def _run(name: tuple[str, ...], point: importlib.metadata.EntryPoint, words: list[str]) -> int:
    from dovetail_protocols import CommandError

    prog = f"dovetail {' '.join(name)}"
    try:
        kind = point.load()
    except ImportError as error:
        print(f"error: {prog} needs a package that is not installed ({error}); install its extra", file=sys.stderr)
        return 2
    try:
        return _parsed(kind, words, prog).run() or 0
    except (CommandError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # commands import what they need when they run
        print(f"error: {prog} needs a package that is not installed ({error}); install its extra", file=sys.stderr)
        return 2


def _parsed(kind: type[Any], words: list[str], prog: str) -> Any:
    """Return the command that the words describe; what its dataclass refuses is the user's error."""
    import tyro

    default, words = _config_file(kind, words)
    try:
        return tyro.cli(kind, args=words, prog=prog, default=default, config=(tyro.conf.PositionalRequiredArgs,))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _config_file(kind: type[Any], words: list[str]) -> tuple[Any, list[str]]:
    """Take ``--config FILE`` out of the words and return the dataclass that it describes; flags override it."""
    if "--config" not in words:
        return None, words
    at = words.index("--config")
    if at + 1 == len(words):
        raise ConfigError("--config needs a file (.yaml, .toml or .json)")
    return load(kind, Path(words[at + 1])), words[:at] + words[at + 2 :]
