"""Tokenizers behind one protocol: train, load, chat templates, incremental decoding."""

from dovetail_text.errors import ChatError, TokenizerError
from dovetail_text.stops import StopStrings
from dovetail_text.template import CHATML
from dovetail_text.tokenizer import Tokenizer
from dovetail_text.train import WORDS, train_bpe

__all__ = ["CHATML", "WORDS", "ChatError", "StopStrings", "Tokenizer", "TokenizerError", "train_bpe"]
