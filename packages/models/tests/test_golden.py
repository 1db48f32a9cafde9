"""Golden checkpoints of Hugging Face transformers: logits, gradients, and tensors back byte for byte."""

import json
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import LinearScaling, Llama3Scaling, YarnScaling
from dovetail_models import Llama, from_pretrained, llama_map, merge, save_pretrained, split
from dovetail_protocols import paths
from dovetail_weights import open_directory

MATRIX: dict[str, Any] = tomllib.loads((Path(__file__).parent / "matrix.toml").read_text())
NAMES = pytest.mark.parametrize("name", MATRIX)


@pytest.fixture(scope="module")
def models(golden: Path) -> dict[str, Llama]:
    return {name: from_pretrained(golden / name) for name in MATRIX}


def features_of(model: Llama, folder: Path) -> set[str]:
    config = model.config
    kinds = {type(None): "default", LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
    heads = {config.heads: "full heads", 1: "one key-value head"}.get(config.groups, "grouped heads")
    raw = json.loads((folder / "config.json").read_text())
    found = {"tied" if config.tied else "untied", heads, f"rope {kinds[type(config.rope_scaling)]}"}
    optional = {
        "attention bias": config.attention_bias,
        "mlp bias": config.mlp_bias,
        "head_dim != d/heads": config.dim != config.features // config.heads,
        "norm epsilon": config.norm_eps != 1e-6,
        "transformers 4 config": "rope_parameters" not in raw,
        "several shards": len(open_directory(folder).files) > 1,
        "bfloat16 checkpoint": next(iter(open_directory(folder).values())).dtype == jnp.bfloat16,
        "generation config": isinstance(raw["eos_token_id"], list),
    }
    return found | {name for name, is_so in optional.items() if is_so}


@NAMES
def test_matrix_is_true(name: str, models: dict[str, Llama], golden: Path) -> None:
    """A configuration that no longer exercises what the matrix says leaves a feature untested."""
    assert features_of(models[name], golden / name) == set(MATRIX[name]["exercises"])


def test_matrix_covers_the_family() -> None:
    """Every feature that LlamaConfig offers is in some configuration."""
    covered = {feature for case in MATRIX.values() for feature in case["exercises"]}
    assert covered >= {"tied", "untied", "full heads", "grouped heads", "one key-value head", "head_dim != d/heads"}
    assert covered >= {f"rope {kind}" for kind in ("default", "linear", "llama3", "yarn")}
    assert covered >= {"attention bias", "mlp bias"}


@NAMES
def test_logits_and_gradients(name: str, models: dict[str, Llama], golden: Path, logits: Any, summed_loss: Any) -> None:
    """A checkpoint trained elsewhere computes and trains differently here."""
    expected = np.load(golden / name / "expected.npz")
    tokens, targets = jnp.asarray(expected["tokens"]), jnp.asarray(expected["targets"])
    definition, params = split(models[name])

    @jax.jit
    def run(params: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: summed_loss(merge(definition, p), tokens, targets))(params)
        return logits(merge(definition, params), tokens), loss, gradients

    got, loss, gradients = run(params)
    np.testing.assert_allclose(got, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    theirs = by_their_names(models[name], gradients)
    compared = set(expected.files) - {"tokens", "targets", "logits", "loss"}
    assert len(compared) >= 6
    for tensor in compared:
        scale = np.abs(expected[tensor]).max()
        np.testing.assert_allclose(theirs[tensor] / scale, expected[tensor] / scale, atol=2e-5, err_msg=tensor)


def by_their_names(model: Llama, tree: Any) -> dict[str, np.ndarray]:
    """Return a tree like the model's parameters under the checkpoint's names and in its layout."""
    leaves = {address: np.asarray(leaf) for address, leaf in paths.flatten(tree).items()}
    out: dict[str, np.ndarray] = {}
    config = model.config
    for group in llama_map(config).groups(leaves):
        (address,), (tensor,) = group.addresses, group.names
        leaf = leaves[address]
        if address.endswith("attention/out"):
            leaf = leaf.reshape(-1, config.features).T
        elif address.split("/")[-1] in ("query", "key", "value"):
            leaf = leaf.reshape(config.features, -1).T
        elif address.split("/")[-1] in ("head", "gate", "up", "down"):
            leaf = leaf.T
        out[tensor] = leaf.reshape(-1) if tensor.endswith("bias") else leaf
    return out


@NAMES
def test_round_trip_is_byte_identical(name: str, golden: Path, tmp_path: Path) -> None:
    """Loading and saving must not change a bit of a tensor, nor lose or rename one."""
    dtype = jnp.bfloat16 if "bfloat16 checkpoint" in MATRIX[name]["exercises"] else jnp.float32
    model = from_pretrained(golden / name, param_dtype=dtype)
    save_pretrained(model, tmp_path / "out", max_shard_bytes=30_000)
    before, after = open_directory(golden / name), open_directory(tmp_path / "out")
    assert len(after.files) > 1
    assert set(after) == set(before)
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    again = from_pretrained(tmp_path / "out", param_dtype=dtype)
    assert again.config == model.config
