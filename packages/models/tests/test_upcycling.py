"""An upcycled model begins as the dense one; what its experts are; streaming; what is refused."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, MODELS, by_default

from dovetail_models import (
    ConfigError,
    LazyModel,
    Llama,
    LlamaConfig,
    Mixtral,
    from_pretrained,
    lazy,
    repeat_layers,
    save_pretrained,
    upcycle,
)
from dovetail_models.surgery_commands import Upcycle
from dovetail_protocols import CommandError

LLAMA = LlamaConfig(vocab_size=24, features=8, hidden=16, layers=2, heads=4, kv_heads=2, init_std=0.5)
DENSE = {"llama": (Llama, LLAMA)} | {
    name: MODELS[name]
    for name in ("gemma2", "gemma3", "gpt2", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3")
}
TOKENS = jnp.arange(12, dtype=jnp.int32)[None]


def dense(name: str = "llama", **options: Any) -> Any:
    kind, config = DENSE[name]
    return kind(config, rngs=nnx.Rngs(0), **options)


def largest(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.abs(a - b).max())


@pytest.mark.parametrize("name", by_default(DENSE))
def test_it_begins_as_the_dense_model(name: str, logits: Any) -> None:
    """Two slices of each of two copies, of families with gates, biases, norms after blocks, tied embeddings."""
    model = dense(name)
    sparse = upcycle(model, experts=8, top_k=4, granularity=2)
    assert sparse.layers[1].mlp.experts.up.shape[0] == 8
    assert largest(logits(sparse, TOKENS), logits(model, TOKENS)) < 1e-5


@pytest.mark.parametrize("scan", [False, True])
def test_64_experts_8_active(scan: bool, logits: Any) -> None:
    """The reference case: eight copies in eight slices, of which a token chooses one copy."""
    model = dense(scan=scan)
    sparse = upcycle(model, experts=64, top_k=8, granularity=8)
    assert isinstance(sparse, Mixtral)
    assert largest(logits(sparse, TOKENS), logits(model, TOKENS)) < 1e-5


def test_experts_are_slices_and_copies() -> None:
    """Of the MLP's own numbers; routers know copies only."""
    model = dense()
    mlp, sparse = model.layers[1].mlp, upcycle(model, experts=6, top_k=2, granularity=2).layers[1].mlp
    for expert in range(6):
        part = slice(8 * (expert % 2), 8 * (expert % 2) + 8)
        for name in ("gate", "up"):
            got = getattr(sparse.experts, name).get_value()[expert]
            np.testing.assert_array_equal(got, getattr(mlp, name).get_value()[:, part])
        np.testing.assert_array_equal(sparse.experts.down.get_value()[expert], 2 * mlp.down.get_value()[part])
    router = np.asarray(sparse.router.weight.get_value())
    np.testing.assert_array_equal(router[:, ::2], router[:, 1::2])
    assert len(np.unique(router[0])) == 3
    assert 0.2 < router.std() < 1


def test_noise_is_relative_and_follows_the_seed(logits: Any) -> None:
    """It tells copies apart; the same seed makes the same model, whatever part of it is read."""
    model = dense()
    whole = upcycle(model, experts=4, top_k=2).layers[0].mlp.experts
    noisy = {seed: lazy(upcycle(model, experts=4, top_k=2, noise=0.1, seed=seed)).tensors for seed in (1, 2)}
    address = "layers/0/mlp/experts/up"
    added = noisy[1][address].read() - np.asarray(whole.up.get_value())
    scale = np.sqrt(np.mean(np.square(np.asarray(whole.up.get_value()[0]))))
    assert 0.09 < added.std() / scale < 0.11
    assert abs(np.corrcoef(added[0].reshape(-1), added[1].reshape(-1))[0, 1]) < 0.3
    assert not np.allclose(noisy[2][address].read(), noisy[1][address].read())
    stream = upcycle(lazy(model), experts=4, top_k=2, noise=0.1, seed=1).tensors[address]
    part = (slice(1, 3), slice(2, 5), slice(0, 7))
    np.testing.assert_array_equal(stream.read(part), noisy[1][address].read()[part])
    assert largest(logits(upcycle(model, experts=4, top_k=2, noise=0.1), TOKENS), logits(model, TOKENS)) > 1e-3


def test_choices_that_are_no_whole_copies_differ(logits: Any) -> None:
    """The docstring says where logits stay: this is where they do not."""
    model = dense()
    assert largest(logits(upcycle(model, experts=8, top_k=3, granularity=2), TOKENS), logits(model, TOKENS)) > 1e-3


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_some_layers_stay_dense(name: str, logits: Any) -> None:
    """Qwen3-MoE knows dense layers; Mixtral does not, so that a Llama becomes a family of its own."""
    model = dense(name)
    sparse = upcycle(model, experts=4, top_k=1, layers=[1])
    assert type(sparse).__name__ == {"qwen3": "Qwen3Moe", "llama": "SparseLlama"}[name]
    assert hasattr(sparse.layers[0].mlp, "gate")
    assert hasattr(sparse.layers[1].mlp, "experts")
    assert largest(logits(sparse, TOKENS), logits(model, TOKENS)) < 1e-5


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("llama", "MixtralForCausalLM"), ("qwen3", "Qwen3MoeForCausalLM"), ("gpt2", "SparseGPT2LMHeadModel")],
)
def test_a_directory_becomes_a_directory(name: str, architecture: str, tmp_path: Path, logits: Any) -> None:
    """Read again it is the same model: as transformers writes it, or in our form of families it does not know."""
    model = dense(name)
    path = save_pretrained(model, tmp_path / "dense", token_ids={"eos_token_id": 3})
    made = upcycle(path, experts=4, top_k=2, granularity=2)
    assert isinstance(made, LazyModel)
    made.save(tmp_path / "sparse")
    values = json.loads((tmp_path / "sparse/config.json").read_text())
    assert values["architectures"] == [architecture]
    assert values["eos_token_id"] == 3
    again = from_pretrained(tmp_path / "sparse")
    assert largest(logits(again, TOKENS), logits(model, TOKENS)) < 1e-5
    save_pretrained(again, tmp_path / "again")
    assert largest(logits(from_pretrained(tmp_path / "again"), TOKENS), logits(model, TOKENS)) < 1e-5


def test_a_directory_is_upcycled_tensor_by_tensor(tmp_path: Path) -> None:
    """A model of which not even the dense half fits in memory: what is held is about one tensor."""
    config = dataclasses.replace(LLAMA, features=64, hidden=1024, layers=6, vocab_size=64)
    path = save_pretrained(Llama(config, rngs=nnx.Rngs(0)), tmp_path / "dense")
    made = upcycle(path, experts=8, top_k=2, granularity=2, noise=0.01)
    tracemalloc.start()
    made.save(tmp_path / "sparse")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    written = sum(file.stat().st_size for file in (tmp_path / "sparse").glob("*.safetensors"))
    assert written > 18e6
    assert peak < 2e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 6, "granularity": 4}, "experts=6, granularity=4; expected a multiple"),
        ({"experts": 0}, "experts=0"),
        ({"experts": 6, "granularity": 3}, r"granularity=3 does not divide the width of \{'layers/0/mlp': 16"),
        ({"top_k": 5}, "top_k=5; expected between 1 and the 4 experts"),
        ({"layers": [2]}, r"layers=\[2\]; expected some of the 2 layers, from 0"),
        ({"layers": []}, r"layers=\[\]; expected some"),
        ({"noise": -1.0}, "noise=-1.0"),
    ],
)
def test_numbers_that_do_not_fit(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(dense(), **{"experts": 4, "top_k": 2} | options)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "mamba2"])
def test_models_without_dense_mlps(name: str) -> None:
    """Experts of experts, or of nothing."""
    kind, config = MODELS[name]
    with pytest.raises(ValueError, match=r"layers \[.*\] of .* have no dense MLP"):
        upcycle(kind(config, rngs=nnx.Rngs(0)), experts=4, top_k=2)


def test_encoders_and_unknown_architectures(tmp_path: Path) -> None:
    """Encoders have no place for what routers tell."""
    kind, config = ENCODERS["bert"]
    with pytest.raises(ValueError, match="BertModel is no family of decoders"):
        upcycle(kind(config, rngs=nnx.Rngs(0)), experts=4, top_k=2)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SparseMixtralForCausalLM"]}))
    with pytest.raises(ValueError, match="MixtralForCausalLM has experts already"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SparseFooForCausalLM"]}))
    with pytest.raises(ConfigError, match="SparseFooForCausalLM"):
        from_pretrained(tmp_path)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    """It says what it wrote; what does not fit leaves nothing."""
    path = save_pretrained(dense(), tmp_path / "dense")

    def run(destination: str, **options: Any) -> None:
        Upcycle(source=str(path), destination=tmp_path / destination, **options).run()

    run("sparse", experts=4, top_k=2, layers=(1,))
    assert f"{tmp_path / 'sparse'}: " in capsys.readouterr().out
    with pytest.raises(CommandError, match="top_k=9"):
        run("other", experts=4, top_k=9)
    with pytest.raises(CommandError, match="overwrite"):
        run("sparse", experts=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "sparse"]


def test_layers_of_our_own_families_are_repeated(logits: Any) -> None:
    """Which layers are dense moves with them."""
    sparse = upcycle(dense("gemma2"), experts=4, top_k=2, layers=[1])
    deeper = repeat_layers(sparse, [0, 1, 1, 0], zero=True)
    assert deeper.config.dense_layers == (0, 3)
    assert largest(logits(deeper, TOKENS), logits(sparse, TOKENS)) < 1e-5
