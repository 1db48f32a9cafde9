"""Hugging Face directories: what is written, and every way in which one can be broken."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dovetail_models import ConfigError, from_pretrained, logical_axes, merge, save_pretrained, split
from dovetail_models.hf_directory import open_pretrained
from dovetail_protocols import paths
from dovetail_protocols.testing import FakeQuantized
from dovetail_runtime import FSDP
from dovetail_weights import WeightsError, open_directory, write_directory

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def saved(build: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(build(), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = {name: np.array(lazy.read()) for name, lazy in open_directory(folder).items()}
    change(tensors)
    files = {"config.json": (folder / "config.json").read_text()}
    write_directory(folder, tensors, extra_files=files, overwrite=True)


def test_what_is_written(build: Any, tmp_path: Path) -> None:
    """Configuration, token ids, tokenizer files and nothing else of the tokenizer's directory."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (tokenizer / name).write_text(f'"{name}"')
    for name in ("config.json", "model.safetensors", "notes.txt", "generation_config.json"):
        (tokenizer / name).write_text("not mine")
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3]}
    model = build(param_dtype=jnp.bfloat16)
    out = save_pretrained(model, tmp_path / "a/b", tokenizer=tokenizer, token_ids=ids, max_shard_bytes=2000)
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert names - shards == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == [2, 3]
    assert json.loads((out / "generation_config.json").read_text()) == ids
    assert (out / "tokenizer.json").read_text() == '"tokenizer.json"'


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(GOLDEN.glob("*/config.json"))])
@pytest.mark.parametrize("options", [{}, {"param_dtype": jnp.bfloat16}], ids=["", "bfloat16"])
def test_a_model_to_fill_is_the_family_s(name: str, options: dict[str, Any]) -> None:
    """The model without values that a directory is read into has shapes, dtypes and names of axes of a built one."""
    given = open_pretrained(GOLDEN / name)
    whole = nnx.eval_shape(lambda: given.family.model(given.config, rngs=nnx.Rngs(0), **options))
    made = given.module(**options)
    assert split(made)[0] == split(whole)[0]
    assert split(made)[1] == split(whole)[1]
    assert logical_axes(made) == logical_axes(whole)


def test_dtypes_on_the_way_in(saved: Path, logits: Any) -> None:
    """Parameters and activations get the dtypes asked for; the values are those of the file, rounded."""
    model = from_pretrained(saved, param_dtype=jnp.bfloat16)
    exact = paths.flatten(split(from_pretrained(saved))[1])
    for address, leaf in paths.flatten(split(model)[1]).items():
        np.testing.assert_array_equal(leaf, exact[address].astype(jnp.bfloat16))
    mixed = from_pretrained(saved, dtype=jnp.bfloat16)
    assert mixed.dtype == jnp.bfloat16
    assert mixed.embedding.get_value().dtype == jnp.float32
    assert np.isfinite(logits(mixed, jnp.zeros((1, 3), jnp.int32))).all()


def test_mapped(saved: Path, logits: Any) -> None:
    """Weights that stay in the file give other logits, or are copied all the same."""
    tokens = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    plain, mapped = (from_pretrained(saved, mapped=where) for where in (False, True))
    np.testing.assert_allclose(logits(mapped, tokens), logits(plain, tokens), atol=1e-5)
    assert mapped.layers[0].mlp.up.get_value().format.layout.major_to_minor == (1, 0)


def test_old_buffers_and_tied_heads_are_ignored(build: Any, small: Any, tmp_path: Path) -> None:
    """Checkpoints of old transformers hold rotary buffers, and tied ones a second copy of the embedding."""
    out = save_pretrained(build(dataclasses.replace(small, tied=True)), tmp_path / "model")

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors(out, add)
    assert from_pretrained(out).config.tied


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "malformed"),
        (b"\xff\xfe{}", "malformed"),
        (b"[1]", "holds list; expected an object"),
        (b"{}", "neither architectures nor model_type"),
        (b"[" * 100_000, "malformed"),
    ],
)
def test_malformed_configurations(copy: Path, content: bytes, message: str) -> None:
    """The file that is wrong is named."""
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(copy)


def test_missing_files(copy: Path, tmp_path: Path) -> None:
    """No directory, no configuration, no weights."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_pretrained(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        from_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="Hugging Face model directory"):
        from_pretrained(copy)


def test_missing_shard(golden: Path, tmp_path: Path) -> None:
    """A download that was cut short."""
    folder = Path(shutil.copytree(golden / "old_style_shards", tmp_path / "model"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        from_pretrained(folder)


def test_truncated_weights(copy: Path) -> None:
    """A file that ends too early is found before anything is read."""
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        from_pretrained(copy)


def test_tensors_that_do_not_fit(copy: Path) -> None:
    """All missing, unexpected and misshapen tensors are listed at once."""

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((3, 3), np.float32)
        tensors["model.layers.0.mlp.more.weight"] = np.ones(3, np.float32)
        tensors["model.layers.0.mlp.gate_proj.weight"] = np.ones((32, 16), np.int32)

    edit_tensors(copy, spoil)
    with pytest.raises(WeightsError) as error:
        from_pretrained(copy)
    for part in (
        "model.norm.weight: missing",
        "model.layers.0.mlp.up_proj.weight: has shape (3, 3)",
        "model.layers.0.mlp.more.weight: unexpected",
        "model.layers.0.mlp.gate_proj.weight: is int32",
    ):
        assert part in str(error.value)


def test_configuration_of_another_model(copy: Path) -> None:
    """Sizes that do not match the tensors; an absurd number of layers must not hang."""
    edit_config(copy, intermediate_size=48)
    with pytest.raises(WeightsError, match=r"mlp\.up_proj\.weight: has shape"):
        from_pretrained(copy)
    edit_config(copy, intermediate_size=32, num_hidden_layers=10**9)
    with pytest.raises(ConfigError, match=r"num_hidden_layers=1000000000, but the checkpoint has only \d+ tensors"):
        from_pretrained(copy)


def test_mesh_without_rules(saved: Path) -> None:
    """Half an instruction is refused rather than ignored."""
    with pytest.raises(ValueError, match="expected both or neither"):
        from_pretrained(saved, rules=FSDP)


def test_existing_directories_are_kept(build: Any, copy: Path) -> None:
    """Nothing is replaced without being told, and then as a whole."""
    before = (copy / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pretrained(build(), copy)
    assert (copy / "model.safetensors").read_bytes() == before
    (copy / "stale.txt").write_text("old")
    save_pretrained(build(param_dtype=jnp.bfloat16), copy, overwrite=True)
    assert not (copy / "stale.txt").exists()
    assert from_pretrained(copy).config.vocab_size == 48


def test_a_failed_save_leaves_nothing(build: Any, tmp_path: Path) -> None:
    """No directory that looks like a model after an error, and an earlier export survives."""
    definition, params = split(build())
    quantized = merge(definition, FakeQuantized.of(params, "layers/*/mlp/*").quantized)
    with pytest.raises(WeightsError, match=r"layers/0/mlp/up/qvalue: no rule"):
        save_pretrained(quantized, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        save_pretrained(build(), tmp_path / "out", tokenizer=tmp_path)
    with pytest.raises(ConfigError, match="_token_id"):
        save_pretrained(build(), tmp_path / "out", token_ids={"eos": 1})
    with pytest.raises(WeightsError, match="max_shard_bytes"):
        save_pretrained(build(), tmp_path / "out", max_shard_bytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_pretrained(build(), tmp_path / "file/out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
