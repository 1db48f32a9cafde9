"""README blocks and docstring examples run with the tests; children find the workers' module."""

import sys
from pathlib import Path

from sybil import Sybil
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser

sys.path.insert(0, str(Path(__file__).parent))

_PACKAGE = Path(__file__).parents[1]
_readme = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md"], path=str(_PACKAGE))
_docstrings = Sybil(parsers=[DocTestParser()], patterns=["*.py"], path=str(_PACKAGE / "src"))
pytest_collect_file = (_readme + _docstrings).pytest()
