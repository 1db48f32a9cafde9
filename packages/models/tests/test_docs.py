"""Every example of the README and of the docstrings runs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from sybil import Document
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

import dovetail_models as package

ROOT = Path(__file__).parents[1]
MODULES = sorted(ROOT.glob("src/**/*.py"))


def test_readme() -> None:
    """The first thing that a reader copies works."""
    examples = list(Document.parse(str(ROOT / "README.md"), PythonCodeBlockParser()).examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_docstrings(module: Path) -> None:
    """Every `>>>` prints what it shows."""
    document = PythonDocStringDocument.parse(str(module), DocTestParser())
    document.namespace.update({name: getattr(package, name) for name in package.__all__}, jax=jax, jnp=jnp)
    for example in document.examples():
        example.evaluate()
