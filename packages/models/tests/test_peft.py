"""If these fail, an adapter of `peft` gives other logits here, or one of ours is not what it expects of a directory."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, FEW, MODELS, by_default
from peft_files import edited, rewritten, same
from test_lora import filled, weights

from dovetail_models import (
    ConfigError,
    add_lora,
    from_pretrained,
    lazy,
    load_lora,
    lora_of,
    merge_lora,
    save_lora,
    save_pretrained,
    with_lora,
)
from dovetail_models.adapter import flat_adapter
from dovetail_models.family import family_of
from dovetail_models.lora_command import LoraCommand
from dovetail_protocols import CommandError
from dovetail_weights import SafetensorsFile, WeightsError

GOLDEN = ("lora", "rslora_patterns", "dora_fused", "fused", "tied", "experts")
UP = "layers/0/mlp/up"


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", GOLDEN)
def test_adapters_of_peft(name: str, golden: Path, logits: Any, tmp_path: Path) -> None:
    """Logits are those that peft computed: put on, in a loop over layers, merged, and saved again."""
    expected = np.load(golden / "adapters" / name / "expected.npz")
    base, tokens = golden / str(expected["base"]), jnp.asarray(expected["tokens"])
    model = from_pretrained(base)
    adapter = load_lora(golden / "adapters" / name, base)
    assert np.abs(logits(model, tokens) - expected["logits"]).max() > 0.05
    save_lora(base, tmp_path / "again", adapter=adapter)
    again = load_lora(tmp_path / "again", model)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, adapter)
    for changed in (
        with_lora(model, adapter),
        with_lora(from_pretrained(base, scan=name in ("lora", "tied")), adapter),
        merge_lora(base, adapter).build(),
        with_lora(model, again),
    ):
        np.testing.assert_allclose(logits(changed, tokens), expected["logits"], atol=1e-4)


@pytest.mark.parametrize("name", by_default(MODELS | ENCODERS, FEW))
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Every weight of every family that a module or parameter of theirs holds, and what does not is named."""
    kind, config = (MODELS | ENCODERS)[name]
    base = kind(config, rngs=nnx.Rngs(0))
    model = filled(add_lora(base, weights(base), rank=2, alpha=4.0, rngs=nnx.Rngs(1)))
    images = [address for address in weights(base) if address.endswith("patches/weight")]
    if images:
        with pytest.raises(ValueError, match=f"{images[0]}: no module there that peft adapts"):
            save_lora(model, tmp_path / "out")
        return
    save_lora(model, tmp_path / "out")
    again = load_lora(tmp_path / "out", base)
    before, after = (merge_lora(base, adapter) for adapter in (lora_of(model), again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *(nnx.state(m) for m in (before, after)))


def test_what_is_written(build: Any, small: Any, tmp_path: Path) -> None:
    """Names, ranks and alphas as peft has them; ends of names where they say it all."""
    base = build(dataclasses.replace(small, layers=2))
    one = add_lora(base, ["layers/*/attention/query", "embedding"], rank=4, alpha=8.0, rngs=nnx.Rngs(1))
    two = add_lora(base, "layers/1/mlp/up", rank=2, rslora=True, rngs=nnx.Rngs(2))
    adapter = lora_of(one)
    adapter["layers"][1]["mlp"] = lora_of(two)["layers"][1]["mlp"]
    folder = save_lora(base, tmp_path / "out", adapter=adapter, base="org/name")
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["target_modules"] == ["1.mlp.up_proj", "embed_tokens", "q_proj"]
    assert (values["r"], values["lora_alpha"], values["rank_pattern"]) == (4, 8, {"model.layers.1.mlp.up_proj": 2})
    assert values["alpha_pattern"] == {"model.layers.1.mlp.up_proj": pytest.approx(2 * 2**0.5)}
    assert (values["peft_type"], values["task_type"], values["base_model_name_or_path"]) == (
        "LORA",
        "CAUSAL_LM",
        "org/name",
    )
    tensors = SafetensorsFile(folder / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model."): tensors[name].shape for name in tensors} == {
        "model.embed_tokens.lora_embedding_A": (4, 48),
        "model.embed_tokens.lora_embedding_B": (16, 4),
        "model.layers.0.self_attn.q_proj.lora_A.weight": (4, 16),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (32, 4),
        "model.layers.1.self_attn.q_proj.lora_A.weight": (4, 16),
        "model.layers.1.self_attn.q_proj.lora_B.weight": (32, 4),
        "model.layers.1.mlp.up_proj.lora_A.weight": (2, 16),
        "model.layers.1.mlp.up_proj.lora_B.weight": (32, 2),
    }
    same(load_lora(folder, base), adapter)
    stacked = with_lora(build(dataclasses.replace(small, layers=2), scan=True), lora_of(one))
    save_lora(stacked, tmp_path / "stacked")
    same(load_lora(tmp_path / "stacked", lazy(base)), lora_of(one))
    with pytest.raises(FileExistsError, match="overwrite"):
        save_lora(stacked, tmp_path / "stacked")


def test_what_shares_a_tensor_shares_its_first_array(tmp_path: Path) -> None:
    """Ranks of fused weights add up once, and not with every way there and back."""
    kind, config = MODELS["gpt2"]
    base = kind(config, rngs=nnx.Rngs(0))
    model = filled(add_lora(base, "layers/0/attention/{query,key,value}", rank=2, rngs=nnx.Rngs(1)))
    for i in range(2):
        save_lora(model, tmp_path / str(i))
        model = with_lora(base, load_lora(tmp_path / str(i), base))
    values = [json.loads((tmp_path / str(i) / "adapter_config.json").read_text()) for i in range(2)]
    assert [value["r"] for value in values] == [6, 6]


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other methods": ({"peft_type": "LOHA"}, "peft_type='LOHA'; expected 'LORA'"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'; expected 'none'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]; expected none"),
    "an unknown field": ({"use_new": True}, "use_new=True"),
    "altered bases": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' alters the base"),
    "no rank": ({"r": None}, "r=None; expected an int"),
    "another rank": ({"r": 3}, r"model\.\S+: its tensors have rank 2, adapter_config.json says 3"),
    "a rank of one module": ({"rank_pattern": {"up_proj": 5}}, "up_proj: its tensors have rank 2, .* says 5"),
    "a pattern that is none": ({"rank_pattern": {"(": 5}}, "'\\(' is no regular expression"),
    "patterns of something else": (
        {"alpha_pattern": {"up_proj": "x"}},
        "up_proj='x'; expected a float",
    ),
    "targets of something else": ({"target_modules": [3]}, "target_modules=.*expected a list of names"),
    "lists of something else": ({"layers_pattern": [3]}, "layers_pattern=.*expected a list of names"),
    "layers of something else": ({"layers_to_transform": ["a"]}, "layers_to_transform=.*expected numbers"),
    "tensors without a target": ({"target_modules": ["q_proj"]}, "there are tensors for it, but adapter_config.json"),
    "tensors of an excluded module": ({"exclude_modules": ["q_proj"]}, "q_proj: there are tensors for it"),
    "magnitudes that are not there": ({"use_dora": True}, "magnitudes None with use_dora=True"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_refused(name: str, folder: Path, build: Any) -> None:
    changes, match = CONFIGS[name]
    with pytest.raises(ValueError, match=match):
        load_lora(edited(folder, **changes), build())


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ONES = np.ones((2, 16), np.float32)
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "half of a module": ({f"{Q}.lora_B.weight": None}, r"q_proj: the adapter has \['A'\] of it; expected A and B"),
    "another shape": (
        {f"{Q}.lora_A.weight": np.ones((2, 17), np.float32)},
        r"layers/0/attention/query: .*A \(2, 17\).*another base",
    ),
    "NaN": ({f"{Q}.lora_A.weight": ONES * np.nan}, "layers/0/attention/query of the adapter in .*: holds NaN"),
    "another tensor": ({f"{Q}.lora_C.weight": ONES}, "lora_C.weight' is none of LoRA or DoRA"),
    "an unknown module": (
        {f"{Q}x.lora_{part}.weight": ONES for part in "AB"},
        r"q_projx: the adapter changes it, the model has no such weight; the nearest are: model\S+q_proj",
    ),
    "magnitudes": (
        {f"{Q}.lora_magnitude_vector": np.ones(32, np.float32)},
        r"q_proj: magnitudes \(32,\) with use_dora=False",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_refused(name: str, folder: Path, build: Any) -> None:
    changes, match = TENSORS[name]
    with pytest.raises(ValueError, match=match):
        load_lora(rewritten(folder, **changes), build())


def test_a_family_of_what_is_no_directory(build: Any, folder: Path, tmp_path: Path) -> None:
    """An architecture is how a directory is read; a model has one already."""
    base = build()
    for model in (base, lazy(base)):
        with pytest.raises(ValueError, match="family='NoSuch' says how a directory is read, and the model is L"):
            load_lora(folder, model, family="NoSuch")
        same(load_lora(folder, model, family=family_of(base)), load_lora(folder, base))
    with pytest.raises(ConfigError, match="family='NoSuch'; expected one of"):
        load_lora(folder, save_pretrained(base, tmp_path / "base"), family="NoSuch")


def test_a_directory_has_no_adapter_of_its_own(build: Any, tmp_path: Path, untyped: None) -> None:
    for model in (tmp_path, lazy(build())):
        with pytest.raises(
            TypeError, match=r"the model is (PosixPath|LazyModel); expected a model in memory.*adapter="
        ):
            save_lora(model, tmp_path / "out")


def test_files_that_are_not_there_or_damaged(folder: Path, build: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.adapter_config.json does not exist"):
        load_lora(tmp_path / "nowhere", build())
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="adapter_model"):
        load_lora(folder, build())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="save the adapter as safetensors"):
        load_lora(folder, build())
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="malformed"):
        load_lora(folder, build())


def test_ties_that_an_adapter_breaks(tmp_path: Path, golden: Path) -> None:
    """A tied embedding has one adapter, for both of its uses."""
    base = golden / "gqa_tied_linear"
    copied = shutil.copytree(golden / "adapters/tied", tmp_path / "a")
    head = "base_model.model.lm_head"
    twice = SafetensorsFile(copied / "adapter_model.safetensors").read(f"{head}.lora_A.weight") * 2
    with pytest.raises(
        ValueError, match=r"embedding: model.embed_tokens and lm_head are one weight, and .* apart; untie"
    ):
        load_lora(rewritten(copied, **{f"{head}.lora_A.weight": twice}), base)
    alone = {f"{head}.lora_A.weight": None, f"{head}.lora_B.weight": None, f"{head}.base_layer.weight": None}
    assert load_lora(rewritten(copied, **alone), base)  # ensure_weight_tying says that it is for both
    with pytest.raises(ValueError, match=r"embedding: .* are one weight"):
        load_lora(edited(copied, ensure_weight_tying=False), base)
    model = add_lora(from_pretrained(base), "embedding", rank=2, dora=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="embedding: it embeds and unembeds, and a magnitude is for one of these"):
        save_lora(model, tmp_path / "b")


def test_magnitudes_that_peft_has_no_place_for(build: Any, tmp_path: Path) -> None:
    kind, config = MODELS["mixtral"]
    experts = add_lora(kind(config, rngs=nnx.Rngs(0)), "layers/0/mlp/experts/*", rank=2, dora=True, rngs=nnx.Rngs(1))
    with pytest.raises(
        ValueError, match=r"experts/down: peft has no magnitudes of parameters such as \S+.mlp.experts.down_proj"
    ):
        save_lora(experts, tmp_path / "a")
    base = build()
    one, two = (lora_of(add_lora(base, p, rank=2, dora=d, rngs=nnx.Rngs(1))) for p, d in ((UP, True), ("head", False)))
    with pytest.raises(ValueError, match="head: it has no magnitude, others have"):
        save_lora(base, tmp_path / "b", adapter=one | two)
    with pytest.raises(ValueError, match=f"{UP}: the adapter is of a weight"):
        save_lora(base, tmp_path / "c", adapter={"layers": {0: {"mlp": {"up": flat_adapter(two)["head"]}}}})
    spoilt = dataclasses.replace(flat_adapter(two)["head"], a=jnp.full((16, 2), jnp.inf))
    with pytest.raises(ValueError, match="head: holds NaN"):
        save_lora(base, tmp_path / "d", adapter={"head": spoilt})
    assert not list(tmp_path.iterdir())


def test_adapters_of_another_model(build: Any, small: Any, folder: Path, tmp_path: Path) -> None:
    other = save_pretrained(build(dataclasses.replace(small, hidden=40)), tmp_path / "other")
    with pytest.raises(ValueError, match=r"layers/0/mlp/\w+: the adapter of .* another base"):
        load_lora(folder, other)


def test_the_command_shows_and_merges(golden: Path, tmp_path: Path, capsys: Any) -> None:
    base, path = golden / "gqa_llama3", golden / "adapters/lora"
    LoraCommand(str(path), str(base)).run()
    shown = capsys.readouterr().out.splitlines()
    assert "layers/*/attention/query  LoRA of rank 2, scale 1.5: 2 with 256 numbers" in "\n".join(shown)
    assert shown[-1].endswith("kB")
    LoraCommand(str(path), str(base), tmp_path / "merged", dtype="float32").run()
    expected = merge_lora(base, load_lora(path, base)).build()
    made = from_pretrained(tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(made), nnx.state(expected))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "float32"}, "--dtype=float32: how a merged"),
        ({"max_shard_bytes": 10, "overwrite": True}, "--max-shard-bytes=10, --overwrite=True: .*expected --merged"),
    ],
)
def test_how_to_write_what_is_not_written(options: Any, match: str, golden: Path, capsys: Any) -> None:
    """Whoever gives them expects a model."""
    with pytest.raises(CommandError, match=match):
        LoraCommand(str(golden / "adapters/lora"), str(golden / "gqa_llama3"), **options).run()
    assert not capsys.readouterr().out


def test_the_command_leaves_nothing_after_an_error(golden: Path, tmp_path: Path) -> None:
    base, path = golden / "gqa_llama3", golden / "adapters/lora"
    for adapter, model, match in (
        (tmp_path, base, "adapter_config.json does not exist"),
        (path, golden / "gpt2_learned_positions", "the model has no such weight"),
        (path, tmp_path, "config.json does not exist"),
    ):
        with pytest.raises(CommandError, match=match):
            LoraCommand(str(adapter), str(model), tmp_path / "merged").run()
    huge = edited(shutil.copytree(path, tmp_path / "huge"), alpha_pattern={r"1\.mlp\.up_proj": 1e39})
    with pytest.raises(CommandError, match="layers/1/mlp/up with its adapter: holds NaN"):
        LoraCommand(str(huge), str(base), tmp_path / "merged").run()
    assert [entry.name for entry in tmp_path.iterdir()] == ["huge"]
    LoraCommand(str(path), str(base), tmp_path / "merged").run()
    with pytest.raises(CommandError, match="overwrite"):
        LoraCommand(str(path), str(base), tmp_path / "merged").run()
