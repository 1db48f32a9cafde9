"""Tokenizers behind one protocol: train, load, chat templates, incremental decoding."""
