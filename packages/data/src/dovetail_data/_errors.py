"""The errors that name what is wrong with a corpus or a cache."""

__all__ = ["CacheError", "CorpusError"]


class CorpusError(ValueError):
    """A corpus cannot be read as documents; the message names the file and, where it has them, the line or row."""


class CacheError(ValueError):
    """A token cache is missing, unfinished, damaged or made from something else; the message names the file."""
