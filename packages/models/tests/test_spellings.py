"""Checkpoints as the hub has them: names of old, parts of larger models, buffers that nobody needs."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, MODELS

from dovetail_models import ConfigError, convert, from_pretrained, save_pretrained, split
from dovetail_models.commands import Convert, Describe
from dovetail_protocols import CommandError
from dovetail_weights import WeightsError, open_directory, write_directory

ONE = np.ones(1, np.float32)


def older(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def without(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def within(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


HEADS = {
    "cls.predictions.bias": ONE,
    "cls.predictions.transform.LayerNorm.gamma": ONE,
    "cls.seq_relationship.weight": ONE,
    "bert.embeddings.position_ids": np.arange(9),
}
POOLER = {"bert.pooler.dense.weight": ONE, "bert.pooler.dense.bias": ONE}
MASKS = {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "h.1.attn.masked_bias": ONE}
DECODER = {"decoder.block.0.layer.1.EncDecAttention.q.weight": ONE, "lm_head.weight": ONE}
# A model, how its names are spelled, which tensors stand beside, and which architecture config.json names.
CASES: dict[str, tuple[Callable[..., Any], Any, Callable[[str], str], dict[str, np.ndarray], str | None]] = {
    "gpt2": (*MODELS["gpt2"], without("transformer."), MASKS, None),
    "gpt2 with masks": (*MODELS["gpt2"], str, {f"transformer.{name}": mask for name, mask in MASKS.items()}, None),
    "bert": (*ENCODERS["bert"], older, {}, None),
    "bert within": (*ENCODERS["bert"], within("bert."), HEADS, "BertForMaskedLM"),
    "bert of old within": (*ENCODERS["bert"], lambda n: older(f"bert.{n}"), HEADS, "BertForPreTraining"),
    "masked_lm": (*ENCODERS["masked_lm"], older, POOLER, None),
    "masked_lm within": (
        *ENCODERS["masked_lm"],
        lambda name: older(name.removeprefix("bert.")),
        {"cls.seq_relationship.bias": ONE, "pooler.dense.bias": ONE},
        "BertForPreTraining",
    ),
    "siglip text": (*ENCODERS["siglip text"], within("text_model."), {}, None),
    "siglip vision": (
        *ENCODERS["siglip vision"],
        within("vision_model."),
        {"vision_model.embeddings.position_ids": np.arange(4)},
        None,
    ),
    "t5": (*ENCODERS["t5"], str, DECODER, "T5ForConditionalGeneration"),
    "t5 without shared": (
        *ENCODERS["t5"],
        lambda name: "encoder.embed_tokens.weight" if name == "shared.weight" else name,
        {},
        None,
    ),
    "vit": (*ENCODERS["vit"], within("vit."), {"classifier.weight": ONE}, "ViTForImageClassification"),
    "classifier": (*ENCODERS["classifier"], str, {"vit.pooler.dense.bias": ONE}, None),
}


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.read()) for name, tensor in open_directory(folder).items()}


def written(folder: Path, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    """Write a directory's configuration with other tensors."""
    values = json.loads((folder / "config.json").read_text()) | changes
    files: dict[str, str | bytes] = {"config.json": json.dumps(values)}
    return write_directory(folder.parent / "spelled", tensors, extra_files=files)


def same(model: Any, other: Any) -> None:
    assert model.config == dataclasses.replace(other.config, init_std=model.config.init_std)  # SigLIP does not write it
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], split(other)[1])


@pytest.mark.parametrize("name", CASES)
def test_spellings(name: str, tmp_path: Path) -> None:
    """A checkpoint of the hub is refused, read in part, or written so that others do not read it."""
    build, config, spell, more, whole = CASES[name]
    model = build(config, rngs=nnx.Rngs(0))
    plain = save_pretrained(model, tmp_path / "plain")
    architecture = json.loads((plain / "config.json").read_text())["architectures"]
    family = None if whole is None else architecture[0]
    tensors = {spell(name): value for name, value in read(plain).items()}
    assert more or set(tensors) != set(read(plain))
    folder = written(plain, tensors | more, architectures=architecture if whole is None else [whole])
    same(from_pretrained(folder, family=family), model)

    made = convert(folder, tmp_path / "made", family=family)
    assert json.loads((made / "config.json").read_text())["architectures"] == architecture
    expected = read(plain)
    assert set(read(made)) == set(expected)
    for tensor, value in read(made).items():
        np.testing.assert_array_equal(value, expected[tensor], err_msg=tensor)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        Describe(str(folder), family=family).run()
    assert f"stored: {len(expected)} tensors of float32" in out.getvalue()


@pytest.mark.parametrize("name", ["gpt2", "bert", "bert of old within", "masked_lm", "siglip vision", "vit"])
def test_what_is_missing_is_named_as_it_is_spelled(name: str, tmp_path: Path) -> None:
    """A name that the checkpoint would not have leads nowhere."""
    build, config, spell, _, _ = CASES[name]
    plain = save_pretrained(build(config, rngs=nnx.Rngs(0)), tmp_path / "plain")
    tensors = read(plain)
    other = next(tensor for tensor in tensors if spell(tensor) != tensor)
    family = json.loads((plain / "config.json").read_text())["architectures"][0]
    spelled = {spell(tensor): value for tensor, value in tensors.items()}
    folder = written(plain, {tensor: value for tensor, value in spelled.items() if tensor != spell(other)})
    with pytest.raises(WeightsError) as missing:
        from_pretrained(folder, family=family)
    assert f"{spell(other)}: missing; the nearest are: " in str(missing.value)


@pytest.mark.parametrize("name", ["gpt2", "bert", "bert within", "masked_lm within", "siglip text"])
def test_both_spellings_at_once(name: str, tmp_path: Path) -> None:
    """Half of the tensors spelled in one way and half in the other are not put together."""
    build, config, spell, _, _ = CASES[name]
    plain = save_pretrained(build(config, rngs=nnx.Rngs(0)), tmp_path / "plain")
    family = json.loads((plain / "config.json").read_text())["architectures"][0]
    tensors = read(plain)
    changed = [t for t in tensors if spell(t) != t and "pooler" not in t]  # which a model without one ignores
    some = {spell(t) if t in changed[::3] else t: value for t, value in tensors.items()}
    with pytest.raises(WeightsError) as error:
        from_pretrained(written(plain, some), family=family)
    for tensor in changed[::3]:
        assert f"{tensor}: missing; the nearest are: " in str(error.value)
        assert f"{spell(tensor)}: unexpected" in str(error.value)


def test_a_pooler_that_is_not_there(tmp_path: Path) -> None:
    """A model with a pooler does not make one up; one without reads every checkpoint."""
    build, config = ENCODERS["bert"]
    model = build(config, rngs=nnx.Rngs(0))
    plain = save_pretrained(model, tmp_path / "plain")
    tensors = {name: value for name, value in read(plain).items() if not name.startswith("pooler.")}
    folder = written(plain, tensors)
    with pytest.raises(WeightsError, match=r"pooler\.dense\.weight: missing"):
        from_pretrained(folder)
    bare = build(config, rngs=nnx.Rngs(0), pooler=False)
    for path in (plain, folder):
        same(from_pretrained(path, pooler=False), bare)


def test_parts_are_asked_for(tmp_path: Path) -> None:
    """A checkpoint of a larger model is not taken for a part of it in silence, nor for one of another kind."""
    build, config = ENCODERS["bert"]
    plain = save_pretrained(build(config, rngs=nnx.Rngs(0)), tmp_path / "plain")
    folder = written(plain, read(plain), architectures=["BertForPreTraining"])
    with pytest.raises(ConfigError, match=r"or family= one of \['BertForMaskedLM', 'BertModel'\], which such"):
        from_pretrained(folder)
    with pytest.raises(ConfigError, match="family='BertForPreTraining'; expected one of"):
        from_pretrained(folder, family="BertForPreTraining")
    with pytest.raises(ConfigError, match=r"architectures=\['BertForPreTraining'\]; expected \['ViTModel'\]"):
        convert(folder, tmp_path / "made", family="ViTModel")
    with pytest.raises(CommandError, match="family='T5'"):
        Convert(str(folder), tmp_path / "made", family="T5").run()
    Convert(str(folder), tmp_path / "made", family="BertModel").run()
    same(from_pretrained(tmp_path / "made"), from_pretrained(plain))
