"""Golden checkpoints of Hugging Face transformers: logits, gradients, and tensors back byte for byte."""

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import Clamped, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from dovetail_models import FAMILIES, Gpt2, SparseMLP, from_pretrained, merge, save_pretrained, split, weight_map
from dovetail_models.decoder import Block
from dovetail_models.delta_net import GatedDeltaNet
from dovetail_models.family import architecture_family
from dovetail_models.latent import LatentAttention
from dovetail_models.layers import MLP, GatedMLP, GroupedAttention, LayerNorm
from dovetail_models.state_space import StateSpace
from dovetail_protocols import WindowCache
from dovetail_weights import open_directory, save

MATRIX: dict[str, Any] = tomllib.loads((Path(__file__).parent / "matrix.toml").read_text())
NAMES = pytest.mark.parametrize("name", MATRIX)


@pytest.fixture(scope="module")
def models(golden: Path) -> dict[str, Any]:
    return {name: from_pretrained(golden / name) for name in MATRIX}


def features_of(model: Any, folder: Path) -> set[str]:
    config = model.config
    raw = json.loads((folder / "config.json").read_text())
    attentions = [layer.attention for layer in model.layers if isinstance(layer.attention, GroupedAttention)]
    blocks = [layer for layer in model.layers if isinstance(layer, Block)]
    mlps = [block.mlp for block in blocks]
    sparse = [mlp for mlp in mlps if isinstance(mlp, SparseMLP)]
    found = {"tied" if config.tied else "untied"}
    found |= attention_features(model, attentions) if attentions else set()
    optional = {
        "mlp bias": any(isinstance(mlp, MLP) or mlp.bias for mlp in mlps if isinstance(mlp, GatedMLP | MLP)),
        "experts": bool(sparse),
        "biases of experts": any(mlp.experts.bias and mlp.router.select.bias for mlp in sparse),
        "clamped units": any(isinstance(mlp.experts.activation, Clamped) for mlp in sparse),
        "experts in some layers": 0 < len(sparse) < config.layers,
        "normalised weights of experts": any(mlp.router.select.renormalize for mlp in sparse),
        "shared experts": any(mlp.shared is not None for mlp in sparse),
        "groups of experts": any(mlp.router.select.groups is not None for mlp in sparse),
        "corrected choice of experts": any(mlp.router.select.correction for mlp in sparse),
        "norms before": any(block.before for block in blocks),
        "norms after": any(block.after for block in blocks),
        "layer norms": isinstance(model.norm, LayerNorm),
        "norm epsilon": config.norm_eps != 1e-6,
        "transformers 4 config": "torch_dtype" in raw,
        "several shards": len(open_directory(folder).files) > 1,
        "bfloat16 checkpoint": next(iter(open_directory(folder).values())).dtype == jnp.bfloat16,
        "generation config": isinstance(raw.get("eos_token_id"), list),
    }
    others = recurrent_features(model) | latent_features(model)
    return found | {name for name, is_so in optional.items() if is_so} | others


def attention_features(model: Any, attentions: list[Any]) -> set[str]:
    config, attention = model.config, attentions[0]
    kinds = {type(None): "default", LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
    kinds[LongRopeScaling] = "longrope"
    heads = {config.heads: "full heads", 1: "one key-value head"}.get(attention.kv_heads, "grouped heads")
    rotated = [one.rotary for one in attentions if one.rotary is not None]
    windows = [isinstance(spec, WindowCache) for spec in model.cache_specs()]
    optional = {
        "attention bias": attention.bias,
        "attention sinks": attention.has_sinks,
        "no output bias": attention.bias and not attention.has_out_bias,
        "gated heads": attention.gated,
        "partly turned heads": any(one.rotary is not None and one.rotary.dim < one.head_dim for one in attentions),
        "norms of each head": attention.normed and attention.query_norm.weight.ndim == 1,
        "norms of all heads": attention.normed and attention.query_norm.weight.ndim == 2,
        "soft caps": attention.softcap is not None and model.unembedding()[2] is not None,
        "rope of two kinds": len(set(rotated)) > 1,
        "layers without positions": 0 < len(rotated) < len(attentions),
        "learned positions": isinstance(model, Gpt2),
        "scaled by layer": len({one.scale for one in attentions}) > 1,
        "window": any(windows),
        "window in some layers": any(windows) and not all(windows),
        "heads do not divide features": config.features % config.heads != 0,
        "head_dim != d/heads": config.dim != config.features // config.heads,
    }
    rope = {f"rope {kinds[type(config.rope_scaling)]}"} if rotated else set[str]()
    return {heads, *rope, *(name for name, is_so in optional.items() if is_so)}


def latent_features(model: Any) -> set[str]:
    attentions = [layer.attention for layer in model.layers if isinstance(layer.attention, LatentAttention)]
    if not attentions:
        return set()
    optional = {"attention bias": attentions[0].bias, "latent queries": attentions[0].has_query_latent}
    kind = "yarn" if isinstance(model.config.rope_scaling, YarnScaling) else "default"
    return {"latent attention", f"rope {kind}", *(name for name, is_so in optional.items() if is_so)}


def recurrent_features(model: Any) -> set[str]:
    spaces = [layer.attention for layer in model.layers if isinstance(layer.attention, StateSpace)]
    optional = {
        "delta net": any(isinstance(layer.attention, GatedDeltaNet) for layer in model.layers),
        "state space": bool(spaces),
        "state space bias": any(space.bias for space in spaces),
        "state space groups": any(space.groups > 1 for space in spaces),
        "limited steps": any(space.dt_limits != (0, math.inf) for space in spaces),
    }
    return {name for name, is_so in optional.items() if is_so}


@NAMES
def test_matrix_is_true(name: str, models: dict[str, Any], golden: Path) -> None:
    """A configuration that no longer exercises what the matrix says leaves a feature untested."""
    assert features_of(models[name], golden / name) == set(MATRIX[name]["exercises"])


def test_matrix_covers_the_families() -> None:
    """Every family, and every feature that they offer, is in some configuration."""
    covered = {feature for case in MATRIX.values() for feature in case["exercises"]}
    assert covered >= {"tied", "untied", "full heads", "grouped heads", "one key-value head", "head_dim != d/heads"}
    assert covered >= {f"rope {kind}" for kind in ("default", "linear", "llama3", "longrope", "yarn")}
    assert covered >= {"attention bias", "no output bias", "mlp bias", "norms of each head", "norms of all heads"}
    assert covered >= {"window", "window in some layers", "norms before", "norms after", "soft caps"}
    assert covered >= {"attention sinks", "biases of experts", "clamped units"}
    assert covered >= {"state space", "limited steps", "delta net"}
    assert covered >= {"gated heads", "partly turned heads", "heads do not divide features"}
    assert covered >= {"latent attention", "latent queries", "shared experts", "corrected choice of experts"}
    assert covered >= {"experts", "groups of experts", "experts in some layers", "normalised weights of experts"}
    assert covered >= {"layers without positions", "rope of two kinds"}
    assert covered >= {"learned positions", "layer norms", "scaled by layer"}
    kinds = {architecture_family(name).config_map.model_type for name in FAMILIES}
    others = [
        tomllib.loads((Path(__file__).parent / name).read_text()) for name in ("encoders.toml", "multimodal.toml")
    ]
    made = {case["family"] for case in MATRIX.values()} | {
        architecture_family(case["architecture"]).config_map.model_type for cases in others for case in cases.values()
    }
    assert made == kinds


@NAMES
def test_logits_and_gradients(
    name: str, models: dict[str, Any], golden: Path, tmp_path: Path, logits: Any, summed_loss: Any
) -> None:
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
    theirs = open_directory(save(tmp_path / "gradients", weight_map(models[name].config), gradients))
    compared = set(expected.files) - {"tokens", "targets", "logits", "loss"}
    assert len(compared) >= 5
    for tensor in compared:
        scale = np.abs(expected[tensor]).max()
        np.testing.assert_allclose(theirs.read(tensor) / scale, expected[tensor] / scale, atol=2e-5, err_msg=tensor)


@NAMES
def test_round_trip_is_byte_identical(name: str, golden: Path, tmp_path: Path) -> None:
    """Loading and saving must not change a bit of a tensor, nor lose or rename one."""
    dtype = jnp.bfloat16 if "bfloat16 checkpoint" in MATRIX[name]["exercises"] else jnp.float32
    model = from_pretrained(golden / name, param_dtype=dtype)
    save_pretrained(model, tmp_path / "out", max_shard_bytes=10_000)
    before, after = open_directory(golden / name), open_directory(tmp_path / "out")
    assert len(after.files) > 1
    assert set(after) == set(before)
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    again = from_pretrained(tmp_path / "out", param_dtype=dtype)
    assert again.config == model.config
