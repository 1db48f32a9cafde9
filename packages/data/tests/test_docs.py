"""README blocks and docstring examples run as they are written.

Pytest offers files outside of this folder to no conftest in it, so the examples are parsed and run here.
"""

import importlib
import tempfile
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

PACKAGE = Path(__file__).parents[1]
SOURCES = sorted(path for path in (PACKAGE / "src").rglob("*.py") if ">>>" in path.read_text())


@pytest.mark.parametrize("path", [PACKAGE / "README.md", *SOURCES], ids=lambda path: path.name)
def test_examples(path, tmp_path, monkeypatch):
    """An example that does not run misleads whoever copies it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parser = DocTestParser() if path.suffix == ".py" else PythonCodeBlockParser()
    document = Sybil(parsers=[parser], path=str(path.parent)).parse(path)
    if path.suffix == ".py":
        document.namespace.update(vars(importlib.import_module(f"dovetail_data.{path.stem}")))
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
