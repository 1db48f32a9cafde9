"""Adapters against `peft`: theirs give here the logits that they give there, and ours there what they give here."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from families import load_theirs, random_config, widened
from flax import nnx

from dovetail_kernels import DenseMixer
from dovetail_models import (
    LORA,
    add_lora,
    from_pretrained,
    load_lora,
    lora_of,
    merge,
    merge_lora,
    save_lora,
    split,
    with_lora,
)
from dovetail_models.adapter import flat_adapter
from dovetail_models.state import nested
from dovetail_protocols import paths

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{known}")
    for known in (
        "`is_gradient_checkpointing` is deprecated",
        "fan_in_fan_out is set to",
        "Setting `save_embedding_layers`",
        "Model has `tie_word_embeddings=True`",
        "Could not find a config file",
        "`lora_bias=True` was passed",
        "Adapter 'default'",
    )
]

BATCH, TIME = 2, 11
ATTENTION, DENSE = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
MODULES: dict[str, list[str]] = {
    "llama": [*ATTENTION, *DENSE],
    "qwen3": [*ATTENTION, *DENSE],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gemma2": [*ATTENTION, *DENSE],
}
SPARSE = {
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "gpt_oss": ATTENTION,
    "deepseek_v3": ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
EMBEDDING = {"gpt2": "wte"}
WEIGHTS = ["layers/*/attention/{query,key,value,out}", "layers/*/mlp/{gate,up,down}"]


def base_of(family: str, seed: int, folder: Path, tied: bool | None = None) -> Any:
    config = random_config(seed, family)
    if tied is not None:
        config.tie_word_embeddings = tied
    theirs = widened(config, seed)
    theirs.save_pretrained(folder)
    return theirs


def randomised(model: Any, seed: int) -> Any:
    """Return a model of theirs whose adapters change much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def filled(model: Any, seed: int) -> Any:
    """Return a model of ours whose adapters change much."""
    definition, params = split(model)
    flat, rng = paths.flatten(params), np.random.default_rng(seed)

    def drawn(address: str) -> jax.Array:
        leaf = flat[address]
        if address.endswith("/magnitude"):
            return leaf * jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return merge(definition, paths.update(params, {a: drawn(a) for a in paths.select(params, LORA)}))


def there(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def here(model: Any, tokens: np.ndarray) -> np.ndarray:
    definition, params = split(model)
    positions = jnp.tile(jnp.arange(TIME, dtype=jnp.int32), BATCH)

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        model = merge(definition, params)
        hidden, _, _ = model.hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
        return model.unembed(hidden).reshape(BATCH, TIME, -1)

    return np.asarray(run(params, jnp.asarray(tokens, jnp.int32)))


def close(got: np.ndarray, wanted: np.ndarray, base: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(wanted).max()) / 10)  # of adapters that make logits wide
    np.testing.assert_allclose(got / scale, wanted / scale, atol=1e-4)
    assert np.abs(wanted - base).max() > 1e-2


def tokens_of(config: Any, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (BATCH, TIME))


def read_here(theirs: Any, model: Any, folder: Path, tokens: np.ndarray, base: np.ndarray) -> Any:
    """Check that what is saved there gives the same here, put on and merged, also when it is saved again."""
    wanted = there(theirs, tokens)
    theirs.save_pretrained(folder / "theirs")
    adapter = load_lora(folder / "theirs", model)
    close(here(with_lora(model, adapter), tokens), wanted, base)
    close(here(merge_lora(model, adapter), tokens), wanted, base)
    again = load_lora(save_lora(model, folder / "again", adapter=adapter), model)
    close(here(with_lora(model, again), tokens), wanted, base)
    assert {a: x.shape for a, x in paths.flatten(again).items()} == {
        a: x.shape for a, x in paths.flatten(adapter).items()
    }
    return adapter


def read_there(model: Any, folder: Path, tokens: np.ndarray, base: np.ndarray) -> None:
    """Check that what is saved here gives the same there; a missing or unknown key is a warning, an error here."""
    save_lora(model, folder / "ours")
    theirs = peft.PeftModel.from_pretrained(load_theirs(folder / "base"), folder / "ours").eval()
    wanted = here(model, tokens)
    close(there(theirs, tokens), wanted, base)
    assert {parameter.dtype for name, parameter in theirs.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("seed", range(2))
def test_their_adapters(family: str, kind: str, seed: int, tmp_path: Path) -> None:
    """Attention, MLP and embedding, with ranks and alphas of single modules, of fused and of single tensors."""
    tied = kind != "dora" and bool(seed) and family != "gpt2"  # whose embedding it does not take for one that is tied
    base = base_of(family, seed, tmp_path / "base", tied=tied)
    model, tokens = from_pretrained(tmp_path / "base"), tokens_of(base.config, seed)
    before = there(base, tokens)
    first, *others = MODULES[family]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[first, *others, EMBEDDING.get(family, "embed_tokens")],
        rank_pattern={first: 2, rf"0\..*\.{others[-1]}": 1},
        alpha_pattern={others[0]: 7},
        ensure_weight_tying=base.config.tie_word_embeddings,
        **KINDS[kind],
    )
    read_here(randomised(peft.get_peft_model(base, config), seed), model, tmp_path, tokens, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("seed", range(2))
def test_our_adapters(family: str, kind: str, seed: int, tmp_path: Path) -> None:
    """Attention, MLP, embedding and head: of the weights here, whatever tensors hold them there."""
    base = base_of(family, seed, tmp_path / "base", tied=kind != "dora" and bool(seed))
    model, tokens = from_pretrained(tmp_path / "base"), tokens_of(base.config, seed)
    before = here(model, tokens)
    weights = [WEIGHTS[0], "layers/*/mlp/{up,down}", "positions"] if family == "gpt2" else WEIGHTS
    chosen = [*weights, "embedding", *([] if model.config.tied else ["head"])]
    options = {"dora": kind == "dora", "rslora": kind == "rslora", "alpha": 5.0}
    read_there(filled(add_lora(model, chosen, rank=3, rngs=nnx.Rngs(seed), **options), seed), tmp_path, tokens, before)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "llama"])
def test_our_adapters_of_some_weights(family: str, tmp_path: Path) -> None:
    """Parts of fused tensors, one layer of several, ranks and scales that differ."""
    base = base_of(family, 1, tmp_path / "base")
    model, tokens = from_pretrained(tmp_path / "base"), tokens_of(base.config, 1)
    before = here(model, tokens)
    one = add_lora(model, "layers/*/attention/{query,value}", rank=2, alpha=3.0, rngs=nnx.Rngs(0))
    two = add_lora(model, ["layers/0/mlp/up", "layers/0/attention/out"], rank=3, rngs=nnx.Rngs(1))
    both = lora_of(filled(one, 0)), lora_of(filled(two, 1))
    flat = {address: part for adapter in both for address, part in flat_adapter(adapter).items()}
    flat["layers/0/attention/value"] = flat["layers/0/attention/value"].scaled(4, 0.25)
    read_there(with_lora(model, nested(flat)), tmp_path, tokens, before)


@pytest.mark.parametrize("family", SPARSE)
def test_experts(family: str, tmp_path: Path) -> None:
    """Parameters of experts, which are one of all experts there, and routers, both ways."""
    seed = 3
    base = base_of(family, seed, tmp_path / "base")
    model, tokens = from_pretrained(tmp_path / "base"), tokens_of(base.config, seed)
    before = here(model, tokens)
    chosen = ["layers/*/mlp/experts/{gate,up,down}", "layers/*/mlp/router/weight", "layers/*/attention/out"]
    ours = filled(add_lora(model, chosen, rank=2, alpha=3.0, rngs=nnx.Rngs(0)), 0)
    read_there(ours, tmp_path, tokens, before)
    for parameters in (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["experts.down_proj"]):
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=SPARSE[family], target_parameters=parameters)
        theirs = peft.get_peft_model(load_theirs(tmp_path / "base"), config)
        folder = tmp_path / str(len(parameters))
        folder.mkdir()
        read_here(randomised(theirs, seed), model, folder, tokens, before)


def test_ways_to_name_targets(tmp_path: Path) -> None:
    """A regular expression, some layers only, all linear layers but some."""
    base = base_of("llama", 4, tmp_path / "base")
    model, tokens = from_pretrained(tmp_path / "base"), tokens_of(base.config, 4)
    before = there(base, tokens)
    cases = [
        {"target_modules": r".*layers\.0\..*(q|v)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    ]
    for i, case in enumerate(cases):
        config = peft.LoraConfig(r=2, lora_alpha=3, **case)
        theirs = randomised(peft.get_peft_model(load_theirs(tmp_path / "base"), config), i)
        folder = tmp_path / str(i)
        folder.mkdir()
        read_here(theirs, model, folder, tokens, before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"bias": "all"}, "bias='all'; expected 'none'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, "embedding: model.embed_tokens and lm_head are one weight"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_what_is_not_read(options: Any, match: str, tmp_path: Path) -> None:
    """What would be lost is refused by its name."""
    base = base_of("llama", 0, tmp_path / "base", tied=True)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=match):
        load_lora(tmp_path / "theirs", tmp_path / "base")
