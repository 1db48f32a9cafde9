"""The byte tokenizer meets the contract, so tests against it mean something."""

from dovetail_protocols.testing import check_tokenizer
from dovetail_serve.testing import ByteTokenizer


def test_byte_tokenizer():
    """The tokenizer of tests and examples is none."""
    check_tokenizer(ByteTokenizer(), twin=ByteTokenizer())
