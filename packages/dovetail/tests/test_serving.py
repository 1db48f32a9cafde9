"""`dovetail serve` and `dovetail generate`: what is opened, what is printed, how a server starts and stops."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import openai
import pytest
from flax import nnx

import dovetail_models
import dovetail_text
from dovetail.cli import main
from dovetail.pretrained import Pretrained
from dovetail.serving import ask, cache_directory
from dovetail_protocols import CommandError

TEXTS = ["def main():\n    return 0\n\n\nclass Ä:\n    x = 1234567\n" * 3, "import os\nimport sys\n" * 5]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model with its tokenizer, in a directory with an odd name."""
    path = tmp_path_factory.mktemp("models") / "a model ü"
    tokenizer = dovetail_text.train_bpe(TEXTS, 300)
    tokenizer.save_pretrained(path.parent / "tokenizer")
    config = dovetail_models.LlamaConfig(
        vocab_size=tokenizer.vocab_size, features=32, hidden=48, layers=1, heads=2, max_position=64, init_std=0.3
    )
    model = dovetail_models.Llama(config, rngs=nnx.Rngs(0))
    dovetail_models.save_pretrained(model, path, tokenizer=path.parent / "tokenizer")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compiled programs of the tests stay out of the user's directory; this process keeps none."""
    monkeypatch.setattr("dovetail_engine.compilation_cache", lambda directory: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_generate_prints_what_the_seed_decides(exported, capsys):
    """The same command prints another text each time, or loses the prompt."""
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(exported), "import", "--max-tokens", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("import") for text in texts)


def test_generate_stops_at_the_models_length(exported, capsys):
    """A long reply is refused instead of ending where the model's context does."""
    assert main(["generate", str(exported), "import os", "--max-tokens", "5000", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("import os")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["generate", "{empty}", "x"], "holds no model"),
        (["generate", "{missing}", "x"], r"no directory.*expected a directory with config\.json"),
        (["generate", "{model}", ""], "holds no token"),
        (["generate", "{model}", "abc " * 200], "the model's limit is 64"),
        (["generate", "{model}", "x", "--temperature", "-1"], "temperature=-1.0; expected"),
        (["generate", "{model}", "x", "--top-p", "0"], "top_p=0.0; expected"),
        (["serve", "{missing}"], "holds no model"),
        (["serve", "{empty}", "--mapped"], "holds no config.json; expected a Hugging Face directory, or no --mapped"),
        (["serve", "{model}", "--max-running", "0"], "max_running=0; expected at least 1"),
        (["serve", "{model}", "--max-length", "100"], "max_length=100; a model ü was trained on at most 64 tokens"),
        (["serve", "{model}", "--max-length", "0"], "max_length=0; expected at least 2"),
        (["serve", "{model}", "--max-queue", "0"], "max_queue=0; expected at least 1"),
    ],
)
def test_mistakes_are_one_line(exported, tmp_path, capsys, words, match):
    """A wrong path or option ends in a traceback, or after minutes of compiling."""
    (tmp_path / "empty").mkdir()
    places = {"model": exported, "empty": tmp_path / "empty", "missing": tmp_path / "missing"}
    assert main([word.format(**places) for word in words]) == 2
    shown = capsys.readouterr().err
    assert re.search(match, shown), shown
    assert "Traceback" not in shown


def test_a_damaged_model_is_named(exported, tmp_path):
    """A truncated file is served, or its name is not said."""
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(Exception, match=r"model\.safetensors"):
        Pretrained.open(tmp_path)


def test_where_programs_are_kept(monkeypatch):
    """An empty XDG_CACHE_HOME, which means unset, fills the current directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_directory().is_absolute()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_directory()) == "/somewhere/dovetail/compiled"


def test_a_missing_package_is_named(monkeypatch, exported, capsys):
    """A command whose extra is not installed ends in a traceback."""
    monkeypatch.setitem(sys.modules, "dovetail_engine", None)
    assert main(["generate", str(exported), "x"]) == 2
    assert "dovetail generate needs a package that is not installed" in capsys.readouterr().err


def test_the_quickstarts_client_ignores_proxies(exported, monkeypatch):
    """A proxy that knows nothing of this machine takes the answers away."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    answers, ready = ask(exported, ["import"], max_tokens=4, seed=0)
    assert len(answers) == 1
    assert answers[0].tokens <= 4
    assert ready > 0


def test_a_directory_without_a_run_is_no_run(tmp_path):
    """Any directory is taken for a run."""
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CommandError, match="holds no model"):
        Pretrained.open(tmp_path / "checkpoints")


def lines_of(process):
    """Read a process's output in a thread."""
    found = queue.Queue()

    def read():
        for line in process.stdout:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def start(*words):
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "dovetail", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def url_of(lines):
    shown = ""
    while (line := lines.get(timeout=120)) is not None:
        shown += line
        if found := re.search(r"at (http://\S+/v1)", shown.replace("\n", " ")):
            return found[1]
    raise AssertionError(shown)


def test_the_server_answers_and_drains_on_sigterm(exported, tmp_path):
    """A server from the command line answers nobody, keeps no programs, or dies of SIGTERM with a request in hand."""
    options = ["--port", "0", "--max-running", "2", "--cache", str(tmp_path / "cache"), "--mapped"]
    process = start("serve", str(exported), *options)
    try:
        url = url_of(lines_of(process))
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["a model ü"]
            whole = client.completions.create(model="a model ü", prompt="import", max_tokens=30, seed=1)
            assert whole.usage.completion_tokens <= 30
            parts = client.completions.create(model="a model ü", prompt="import", max_tokens=30, seed=1, stream=True)
            first = next(parts)
            process.send_signal(signal.SIGTERM)
            assert first.choices[0].text + "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        assert process.wait(60) == 0
        assert any((tmp_path / "cache").iterdir())
    finally:
        process.kill()


def test_a_run_opens_like_its_export(exported, tmp_path):
    """A checkpoint is served with other parameters than the export of the same step."""
    import json

    from dovetail.config import dump
    from dovetail.settings import ModelSettings, Settings
    from dovetail_checkpoint import Manager

    model = Pretrained.open(exported)
    settings = Settings(model=ModelSettings(features=32, hidden=48, layers=1, heads=2), seq_len=64)
    (tmp_path / "run.json").write_text(json.dumps({"settings": dump(settings), "environment": {}}))
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with Manager(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, {"params": model.params, "step": 5})
        checkpoints.wait()
        other = jnp.zeros_like(model.params["embedding"])
        checkpoints.save(7, {"params": {**model.params, "embedding": other}, "step": 7})
    for path in ("checkpoints/6", "tokenizer", "modle"):
        with pytest.raises((CommandError, FileNotFoundError)):
            Pretrained.open(tmp_path / path)
    for path, name in (("checkpoints/5", "-5"), (".", "-7"), ("checkpoints", "-7")):
        opened = Pretrained.open(tmp_path / path)
        assert opened.name.endswith(name)
        assert opened.length == 64
        same = bool((opened.params["embedding"] == model.params["embedding"]).all())
        assert same == (name == "-5")
        assert (opened.params["layers"][0]["mlp"]["up"] == model.params["layers"][0]["mlp"]["up"]).all()
