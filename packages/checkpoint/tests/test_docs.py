"""README blocks and docstring examples run as they are written.

Pytest offers files outside of this folder to no conftest in it, so the examples are parsed and run here.
"""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser

PACKAGE = Path(__file__).parents[1]
SOURCES = sorted(p for p in (PACKAGE / "src").rglob("*.py") if ">>>" in p.read_text())


@pytest.mark.parametrize("path", [PACKAGE / "README.md", *SOURCES], ids=lambda path: path.name)
def test_examples(path):
    """An example that does not run misleads whoever copies it."""
    parser = DocTestParser() if path.suffix == ".py" else PythonCodeBlockParser()
    document = Sybil(parsers=[parser], path=str(path.parent)).parse(path)
    if path.suffix == ".py":
        module = __import__(f"dovetail_checkpoint.{path.stem}", fromlist=["*"])
        document.namespace.update(vars(module))
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
