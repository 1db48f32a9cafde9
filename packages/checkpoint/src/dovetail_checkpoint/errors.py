"""What can be wrong with a stored step."""

__all__ = ["CorruptCheckpointError", "TreeMismatchError"]


class CorruptCheckpointError(ValueError):
    """The bytes of a step are not those that were written; the message names the step and the file."""


class TreeMismatchError(ValueError):
    """The saved tree differs from the one asked for; the message names the leaves and both values."""
