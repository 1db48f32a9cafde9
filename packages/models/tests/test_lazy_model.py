"""If these fail, surgery reads other parameters than a model's, or writes a directory that is not the model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, MODELS, by_default

from dovetail_models import LazyModel, elementwise, from_pretrained, lazy, merge, placements, save_pretrained, split
from dovetail_models import surgery as surgery_of
from dovetail_protocols import paths
from dovetail_protocols.testing import FakeQuantized
from dovetail_runtime import FSDP, mesh
from dovetail_weights import WeightsError, digest

ALL = MODELS | ENCODERS


@surgery_of
def doubled(model: Any) -> Any:
    """Double every parameter."""
    tensors = {address: elementwise(lambda x: 2 * x, tensor) for address, tensor in model.tensors.items()}
    return LazyModel(model.family, model.config, tensors)


def same(ours: Any, theirs: Any, factor: float = 1) -> None:
    a, b = (paths.flatten(split(model)[1]) for model in (ours, theirs))
    assert a.keys() == b.keys()
    for address, value in a.items():
        assert value.dtype == b[address].dtype
        np.testing.assert_array_equal(value, factor * b[address], err_msg=address)


def made(name: str, **options: Any) -> Any:
    kind, config = ALL[name]
    return kind(config, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("name", by_default(ALL))
def test_a_model_that_is_built_again_is_the_same(name: str) -> None:
    model = made(name)
    same(lazy(model).build(), model)


def test_stacked_layers_are_read_one_by_one(build: Any, small: Any) -> None:
    config = dataclasses.replace(small, layers=3)
    stacked, single = build(config, scan=True), build(config)
    tensors = lazy(stacked).tensors
    assert set(tensors) == set(paths.flatten(split(single)[1]))
    same(lazy(stacked).build(), single)
    same(lazy(single).build(scan=True), stacked)


def test_a_directory_is_read_and_written_as_pretrained_models_are(tmp_path: Path, build: Any) -> None:
    model = build()
    save_pretrained(model, tmp_path / "a", token_ids={"eos_token_id": 3})
    (tmp_path / "a/tokenizer.json").write_text("{}")
    opened = lazy(tmp_path / "a")
    opened.save(tmp_path / "b")
    same(from_pretrained(tmp_path / "b"), model)
    assert json.loads((tmp_path / "b/config.json").read_text())["eos_token_id"] == 3
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    with pytest.raises(FileExistsError, match="overwrite"):
        opened.save(tmp_path / "b")


def test_a_surgery_of_a_model_keeps_its_options(build: Any, small: Any) -> None:
    config = dataclasses.replace(small, layers=2)
    model = build(
        config, scan=True, remat="full", param_dtype=jnp.bfloat16, dtype=jnp.float32, output_dtype=jnp.bfloat16
    )
    changed = doubled(model)
    assert split(changed)[0] == split(model)[0]
    same(changed, model, factor=2)


def test_a_surgery_of_a_directory_is_lazy(tmp_path: Path, build: Any) -> None:
    model = build()
    path = save_pretrained(model, tmp_path / "a")
    twice = doubled(doubled(path))
    assert isinstance(twice, LazyModel)
    twice.save(tmp_path / "b", dtype="bfloat16")
    definition, params = split(model)
    rounded = merge(definition, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    same(from_pretrained(tmp_path / "b", param_dtype=jnp.bfloat16), rounded, factor=4)


def test_a_lazy_model_is_built_on_a_mesh(build: Any) -> None:
    model, devices = build(), mesh(fsdp=8)
    sharded = lazy(model).build(mesh=devices, rules=FSDP)
    same(sharded, model)
    assert jax.tree.all(
        jax.tree.map(lambda x, place: x.sharding == place, split(sharded)[1], placements(model, devices, FSDP))
    )
    with pytest.raises(ValueError, match=r"on 8 devices; operate on lazy\(model\)"):
        doubled(sharded)
    with pytest.raises(ValueError, match="both or neither"):
        lazy(model).build(mesh=devices)


def test_what_is_no_plain_model_of_ours_is_refused(build: Any, tmp_path: Path) -> None:
    definition, params = split(build())
    quantized = merge(definition, FakeQuantized.of(params, "layers/*/mlp/*").quantized)
    with pytest.raises(ValueError, match="quantized parameters"):
        lazy(quantized)
    with pytest.raises(TypeError, match="Linear"):
        lazy(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        lazy(tmp_path / "nowhere")


def test_parameters_that_are_not_the_configurations_are_not_written(build: Any, tmp_path: Path) -> None:
    model = lazy(build())
    lost = {address: tensor for address, tensor in model.tensors.items() if address != "norm/weight"}
    broken = LazyModel(model.family, model.config, lost)
    with pytest.raises(WeightsError, match="norm/weight: missing"):
        broken.save(tmp_path / "a")
    with pytest.raises(WeightsError, match="norm/weight: missing"):
        broken.build()
    assert not list(tmp_path.iterdir())
