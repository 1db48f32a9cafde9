"""What this package raises about data that it cannot use."""

__all__ = ["ChatError", "TokenizerError"]


class TokenizerError(ValueError):
    """A tokenizer's files, a text or an id cannot be used; the message says which, and what was expected."""


class ChatError(ValueError):
    """A conversation cannot be rendered, or its messages cannot be found in what the template made of them."""
