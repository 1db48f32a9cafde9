"""``dovetail train``: a file and flags describe a run."""

import json

import pytest

from dovetail.cli import main

CONFIG = """
corpus: [{corpus}]
vocab_size: 300
seq_len: 16
batch: 16
accumulate: 2
steps: 4
eval_every: 2
eval_batches: 1
checkpoint_every: 2
validation: 0.5
model: {{features: 16, hidden: 32, layers: 1, heads: 2, kv_heads: 1}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    corpus = folder / "lines.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) + "\n" for i in range(200)))
    (folder / "run.yaml").write_text(CONFIG.format(corpus=corpus))
    out = folder / "out"
    assert main(["train", "--config", str(folder / "run.yaml"), "--out", str(out), "--seed", "3"]) == 0
    return folder, out


def test_flags_override_the_file_and_everything_is_recorded(finished):
    """Breaks when a setting of the file or a flag is not applied."""
    _, out = finished
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert (settings["steps"], settings["seed"], settings["model"]["kv_heads"]) == (4, 3, 1)
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["hidden_size"], config["num_key_value_heads"], config["vocab_size"]) == (16, 1, 300)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if "valid/bits_per_byte" in r] == [2, 4]
    assert all(r["learning_rate"] >= 0 for r in rows if "loss" in r)


def test_the_tokenizer_can_be_given(finished, capsys):
    """The second run uses the first one's tokenizer, and says where it is wrong."""
    folder, out = finished
    words = ["train", "--config", str(folder / "run.yaml"), "--steps", "2"]
    assert main([*words, "--tokenizer", str(out / "tokenizer"), "--out", str(folder / "second")]) == 0
    first, second = (out / "tokenizer/tokenizer.json", folder / "second/tokenizer/tokenizer.json")
    assert first.read_bytes() == second.read_bytes()
    assert main([*words, "--tokenizer", str(folder / "absent"), "--out", str(folder / "third")]) == 2
    assert "absent" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(finished):
    _, out = finished
    before = (out / "metrics.jsonl").read_bytes()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "absent.txt"], "absent.txt"),
        (["--batch", "3", "--accumulate", "2"], "does not divide"),
        (["--model.heads", "3"], "features=16 is no multiple of heads=3"),
        (["--validation", "1.5"], "expected a fraction"),
        (["--model.layers", "0"], "layers=0"),
        (["--optimizer.learning-rate", "-1"], "-1"),
    ],
)
def test_wrong_settings_are_one_line(finished, tmp_path, words, message, capsys):
    folder, _ = finished
    given = ["train", "--config", str(folder / "run.yaml"), "--out", str(tmp_path / "run"), *words]
    try:
        status = main(given)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    shown = capsys.readouterr()
    assert message in shown.err + shown.out
    assert "Traceback" not in shown.err
