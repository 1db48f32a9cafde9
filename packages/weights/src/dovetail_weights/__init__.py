"""Streaming safetensors in and out, with declarative reversible maps."""
