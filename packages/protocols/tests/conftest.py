"""Runs the examples of the README and of the docstrings."""

import jax.numpy as jnp
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser


def _setup(namespace):
    from dovetail_protocols import QuantizedArray, Request, testing

    namespace.update(jnp=jnp, QuantizedArray=QuantizedArray, Request=Request, **vars(testing))
    namespace.update({name: getattr(__import__("dovetail_protocols").paths, name) for name in ("select", "assign")})


pytest_collect_file = (
    Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md"], path="..")
    + Sybil(parsers=[DocTestParser()], patterns=["**/*.py"], path="../src", setup=_setup)
).pytest()
