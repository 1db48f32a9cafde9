"""Command: how a package offers a command without knowing a command-line library.

A command is a frozen dataclass whose fields are its options (their help is the field's docstring or comment) and
whose first docstring line is its summary. A package names it in the entry-point group ``dovetail.commands``; a name
with a dot is a subcommand: ``"checkpoint.ls" = "dovetail_checkpoint.commands:List"``.
"""

from typing import Protocol, runtime_checkable

__all__ = ["Command", "CommandError"]


class CommandError(Exception):
    """An error of the user's that the command line prints without a traceback; exit status 2."""


@runtime_checkable
class Command(Protocol):
    """A frozen dataclass with a `run` method."""

    def run(self) -> int | None:
        """Do it; the returned number is the exit status (None is 0)."""
        ...
