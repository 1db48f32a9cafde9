"""Run the README's Python blocks in an empty directory."""

import os
import sys
import tempfile
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

sys.path.insert(0, str(Path(__file__).parent))

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md"],
    path=str(Path(__file__).parent.parent),
    setup=lambda namespace: os.chdir(tempfile.mkdtemp()),
).pytest()
