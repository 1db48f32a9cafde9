"""Dovetail: a JAX AI stack made of parts that fit."""
