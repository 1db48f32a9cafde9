"""Checkpoints to checkpoints: what changes, what stays, and what is left after an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_models import FAMILIES, ConfigError, convert, from_pretrained, save_pretrained
from dovetail_models.commands import Convert, Describe, List
from dovetail_protocols import CommandError
from dovetail_weights import WeightsError, open_directory, write_directory


@pytest.fixture
def source(golden: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint of several shards, to break."""
    return Path(shutil.copytree(golden / "old_style_shards", tmp_path / "source"))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.read()) for name, tensor in open_directory(folder).items()}


def test_dtype_and_shards(source: Path, tmp_path: Path) -> None:
    """Values are those of the source, rounded once; configuration and further files stay, notes of dtypes are true."""
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"top_k": 3}')
    (source / "training_args.bin").write_bytes(b"x")
    made = convert(source, tmp_path / "made", dtype="float32", max_shard_bytes=9000)
    before, after = tensors_of(source), tensors_of(made)
    assert len(open_directory(made).files) > len(open_directory(source).files)
    assert set(after) == set(before)
    for name, value in before.items():
        assert after[name].dtype == np.float32
        np.testing.assert_array_equal(after[name], value.astype(np.float32))
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, made))
    assert new == old | {"torch_dtype": "float32"}
    assert (made / "generation_config.json").read_text() == '{"top_k": 3}'
    assert (made / "tokenizer.json").exists()
    assert not (made / "training_args.bin").exists()
    back = convert(made, tmp_path / "back", dtype="bfloat16")
    assert [file.name for file in back.glob("*.safetensors*")] == ["model.safetensors"]
    for name, value in tensors_of(back).items():
        assert value.tobytes() == before[name].tobytes()


def test_what_a_model_does_not_need_is_left_out(build: Any, small: Any, tmp_path: Path) -> None:
    """Old buffers and copies of tied embeddings go; what is unknown is an error."""
    folder = save_pretrained(build(), tmp_path / "source")
    files = {"config.json": (folder / "config.json").read_text()}
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    write_directory(folder, tensors_of(folder) | more, extra_files=files, overwrite=True)
    assert set(tensors_of(convert(folder, tmp_path / "made"))) == set(tensors_of(folder)) - set(more)
    write_directory(folder, tensors_of(folder) | {"more": np.ones(2)}, extra_files=files, overwrite=True)
    with pytest.raises(WeightsError, match="more: unexpected"):
        convert(folder, tmp_path / "other")


def test_into_itself(source: Path) -> None:
    """A directory can be replaced by its own conversion."""
    before = tensors_of(source)
    convert(source, source, dtype="float32", overwrite=True)
    for name, value in tensors_of(source).items():
        np.testing.assert_array_equal(value, before[name].astype(np.float32))
    assert from_pretrained(source).config.tied


def test_values_that_do_not_fit(build: Any, tmp_path: Path) -> None:
    """Weights become no infinities in silence."""
    model = build()
    model.norm.weight.set_value(jnp.full_like(model.norm.weight.get_value(), 1e6))
    folder = save_pretrained(model, tmp_path / "source")
    with pytest.raises(WeightsError, match=r"model\.norm\.weight.*float16 cannot hold"):
        convert(folder, tmp_path / "made", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(ValueError, match="dtype='int8'"):
        convert(folder, tmp_path / "made", dtype="int8")


def unknown_architecture(folder: Path) -> None:
    change_config(folder, architectures=["GPTJForCausalLM"])


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def truncated(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "malformed configuration": (lambda f: (f / "config.json").write_text("{"), "config.json is malformed"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "expected a Hugging Face model directory"),
    "unknown architecture": (unknown_architecture, "architectures="),
    "unknown field": (lambda f: change_config(f, pruning=1), r"unknown fields \['pruning'\]"),
    "truncated file": (truncated, "model-00002-of-00002.safetensors"),
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "shards that are not there"),
    "wrong shapes": (lambda f: change_config(f, intermediate_size=48), r"mlp\.up_proj\.weight: has shape"),
    "absurd size": (lambda f: change_config(f, num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "nothing there": (shutil.rmtree, "does not exist"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sources(name: str, source: Path, tmp_path: Path) -> None:
    """A clear error of the commands, which the command line prints, and nothing written."""
    spoil, message = BROKEN[name]
    spoil(source)
    with pytest.raises(CommandError, match=message):
        Convert(str(source), tmp_path / "made").run()
    with pytest.raises(CommandError, match=message):
        Describe(str(source)).run()
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_places_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists stays, a file is no directory, and a refusal of the system is told."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made/kept").write_text("mine")
    with pytest.raises(CommandError, match=r"made.*overwrite"):
        Convert(str(source), tmp_path / "made").run()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["kept"]
    with pytest.raises(CommandError, match=r"File exists: .*kept"):
        Convert(str(source), tmp_path / "made/kept/model").run()

    def denied(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)  # root may write everywhere
    with pytest.raises(CommandError, match=f"Permission denied: .*{tmp_path.name}"):
        Convert(str(source), tmp_path / "new").run()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "made"}


def test_commands_print(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every family with its architecture; sizes, groups and stored bytes; what was written."""
    List().run()
    listed = dict(line.split()[::-1] for line in capsys.readouterr().out.splitlines())
    assert set(listed) == set(FAMILIES)
    assert listed["LlamaForCausalLM"] == "Llama"
    Describe(str(source), time=16).run()
    out = capsys.readouterr().out
    stored = sum(tensor.nbytes for tensor in open_directory(source).values())
    assert "LlamaConfig" in out
    assert f"parameters: {stored // 2:,}, {stored / 1000:.1f} kB" in out
    assert "stored: 20 tensors of bfloat16" in out
    assert "forward of a row of 16 tokens" in out
    for file in source.glob("*.safetensors*"):
        file.unlink()
    Describe(str(source)).run()
    assert f"parameters: {stored // 2:,}, {stored / 1000:.1f} kB" in capsys.readouterr().out
    change_config(source, torch_dtype="int8")
    with pytest.raises(CommandError, match="dtype='int8'"):
        Describe(str(source)).run()


def test_convert_prints(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was written, and where."""
    Convert(str(source), tmp_path / "made", dtype="float32").run()
    stored = sum(tensor.nbytes for tensor in open_directory(tmp_path / "made").values())
    assert capsys.readouterr().out == f"{tmp_path / 'made'}: 20 tensors, {stored / 1000:.1f} kB in 1 files\n"


def test_errors_of_the_library(source: Path, tmp_path: Path) -> None:
    """The function raises what `from_pretrained` raises."""
    unknown_architecture(source)
    with pytest.raises(ConfigError):
        convert(source, tmp_path / "made")
