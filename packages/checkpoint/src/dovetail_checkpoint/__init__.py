"""Atomic, asynchronous checkpoints over Orbax."""
