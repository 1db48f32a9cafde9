"""Every Python block of the site and of the guides at the root runs as it is written."""

from pathlib import Path

import pytest
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
WITH_EXAMPLES = sorted(page for page in PAGES if "```python" in page.read_text())


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples(page, tmp_path, monkeypatch):
    """A reader who copies the blocks in order gets what the page says; relative paths are the reader's own."""
    document = Document.parse(str(page), PythonCodeBlockParser())
    monkeypatch.chdir(tmp_path)
    for example in document.examples():
        example.evaluate()
