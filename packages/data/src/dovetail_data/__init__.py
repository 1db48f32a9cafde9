"""Deterministic, step-addressable data pipelines."""
