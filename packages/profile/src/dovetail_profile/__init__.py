"""Exact cost counting for JAX programs."""
