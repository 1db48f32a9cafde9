"""The corpus that every machine has."""

import pytest

from dovetail_data import CorpusError, python_corpus


def test_it_is_the_sources_without_tests_and_tables():
    """The quickstart trains on it; tests and tables would teach it tables."""
    corpus = python_corpus()
    names = [document.id for document in corpus]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "entities.py"}
    assert 5_000_000 < corpus.summary.bytes < 20_000_000
    assert corpus.fingerprint == python_corpus().fingerprint


def test_a_distribution_without_sources_is_told_clearly(tmp_path):
    """Some distributions ship compiled files only; training on almost nothing would look like a bug elsewhere."""
    (tmp_path / "os.py").write_text("pass\n")
    with pytest.raises(CorpusError, match="ships no sources"):
        python_corpus(tmp_path)
