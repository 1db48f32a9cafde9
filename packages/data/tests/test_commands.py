"""The commands, run as the command line runs them."""

import dataclasses
import re

import pytest
import tokenizers

from dovetail_data import Plan
from dovetail_data.commands import Explain, Show, Stats, Verify
from dovetail_protocols import CommandError


def test_stats_print_what_the_cache_holds(cache, capsys):
    """Figures against the cache itself."""
    assert Stats(cache.directory).run() == 0
    out = capsys.readouterr().out
    for value in ("documents            40", f"{cache.tokens:,}", f"{cache.bytes:,}", cache.fingerprint, "all match"):
        assert value in out
    assert f"{cache.bytes / cache.tokens:.3f}" in out
    assert f"p0: {cache.lengths.min()}" in out
    assert f"p100: {cache.lengths.max()}" in out


def test_stats_find_a_flipped_bit(cache):
    """A check that reads nothing finds nothing."""
    path = cache.directory / "shard-00001.tokens"
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    with pytest.raises(CommandError, match=r"shard-00001\.tokens has digest"):
        Stats(cache.directory).run()


def test_show_prints_the_batch_of_the_plan(cache, capsys):
    """The tokens printed are those trained on."""
    Show(cache.directory, step=3, seq_len=20, batch=4, seed=5, row=2).run()
    out = capsys.readouterr().out
    batch = Plan(cache, seq_len=20, batch=4, seed=5).at(3)
    printed = re.findall(r"^    ([\d ]+)$", out, re.MULTILINE)
    tokens = [int(token) for line in printed for token in line.split()]
    assert tokens == [*batch.tokens[2].tolist(), int(batch.targets[2, -1])]
    assert "row 2: " in out
    assert "row 1: " not in out


def test_show_prints_text_and_sides_of_a_split(cache, capsys, tmp_path):
    """With a tokenizer, people can read it."""
    vocabulary = {f"<{i}>": i for i in range(257)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<0>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    Show(cache.directory, seq_len=10, batch=2, tokenizer=tmp_path, part="validation", validation=0.25).run()
    out = capsys.readouterr().out
    _, held = cache.split(0.25)
    assert Plan(held, seq_len=10, batch=2, seed=0).fingerprint in out
    first = int(Plan(held, seq_len=10, batch=2, seed=0).at(0).tokens[0, 0])
    assert f"<{first}>" in out


@pytest.mark.parametrize("change", [{"step": -1}, {"row": 16}, {"seq_len": 0}, {"part": "train", "validation": 2.0}])
def test_bad_options_are_user_errors(cache, change):
    """No traceback for a typo."""
    with pytest.raises(CommandError):
        dataclasses.replace(Show(cache.directory), **change).run()


def test_missing_files_are_user_errors(cache, tmp_path):
    """The path is in the message."""
    with pytest.raises(CommandError, match="nowhere"):
        Stats(tmp_path / "nowhere").run()
    with pytest.raises(CommandError, match=r"tokenizer\.json cannot be read"):
        Show(cache.directory, tokenizer=tmp_path).run()


def test_explain_names_the_documents(cache, capsys):
    """The same lines as the plan's own, of any packing."""
    Explain(cache.directory, step=2, seq_len=20, batch=3, seed=5, packing="best_fit", row=1).run()
    out = capsys.readouterr().out
    rows = Plan(cache, seq_len=20, batch=3, seed=5, packing="best_fit").explain(2).rows
    assert [line.strip() for line in out.splitlines() if line.startswith("  ")] == [str(piece) for piece in rows[1]]
    with pytest.raises(CommandError, match="step -1"):
        Explain(cache.directory, step=-1).run()


def test_verify_reads_everything(cache, capsys):
    assert Verify(cache.directory).run() == 0
    assert "are as they were written" in capsys.readouterr().out
    path = cache.directory / "shard-00001.lengths"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(CommandError, match=r"shard-00001\.lengths has digest"):
        Verify(cache.directory).run()
