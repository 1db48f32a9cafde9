"""README blocks and docstring examples run as they are written."""

import importlib
from pathlib import Path

import pytest
from sybil import Document
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

PACKAGE = Path(__file__).parents[1]
SOURCES = sorted(path for path in (PACKAGE / "src").rglob("*.py") if ">>>" in path.read_text())


def run(document):
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


def test_readme():
    """The first thing that a reader copies works."""
    run(Document.parse(str(PACKAGE / "README.md"), PythonCodeBlockParser()))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_docstrings(path):
    """Every `>>>` prints what it shows."""
    document = PythonDocStringDocument.parse(str(path), DocTestParser())
    name = ".".join(path.relative_to(PACKAGE / "src").with_suffix("").parts)
    protocols = importlib.import_module("dovetail_protocols")
    document.namespace.update(vars(protocols) | vars(importlib.import_module(name)))
    run(document)
