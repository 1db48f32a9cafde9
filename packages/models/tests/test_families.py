"""What every family must do, on a mesh too, and what belongs to one of them alone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import FEW, MODELS, by_default

from dovetail_kernels import DenseMixer
from dovetail_models import (
    FAMILIES,
    ConfigError,
    Gpt2,
    Llama,
    Phi3,
    from_pretrained,
    merge,
    save_pretrained,
    split,
)
from dovetail_models.decoder import Block
from dovetail_models.family import family_of
from dovetail_models.llama import FAMILY
from dovetail_protocols import FullCache, LanguageModel, LatentCache, WindowCache, paths
from dovetail_protocols.testing import check_language_model

ATTENTION, DENSE = ["layers/*/attention/{query,key,value,out}"], ["layers/*/mlp/{gate,up,down}"]
SPARSE = ["layers/*/mlp/experts/{gate,up,down}", "layers/*/mlp/router/weight"]
STATES = ["layers/*/attention/{in_gate,in_x,in_b,in_c,in_dt,out}"]
WEIGHTS = {
    "glm4_moe": [*ATTENTION, *DENSE, *SPARSE, "layers/*/mlp/shared/*"],
    "gpt2": ["positions", *ATTENTION, "layers/*/mlp/{up,down}"],
    "gpt_oss": [*ATTENTION, *SPARSE],
    "mamba2": STATES,
    "mixtral": [*ATTENTION, *SPARSE],
    "qwen3_moe": [*ATTENTION, *DENSE, *SPARSE],
    "qwen3_next": [
        *("layers/0/attention/in_*", "layers/*/attention/{query,gate,key,value,out}"),
        *(*SPARSE, "layers/*/mlp/shared/*"),
    ],
}


@pytest.mark.parametrize("name", by_default(MODELS, (*FEW, "mamba2")))
def test_conformance(name: str) -> None:
    """What every user of models relies on, with plain and with quantized weights."""
    build, config = MODELS[name]
    model = build(config, rngs=nnx.Rngs(0))
    definition, params = split(model)
    weights = ["embedding", *WEIGHTS.get(name, [*ATTENTION, *DENSE])]
    chosen = paths.select(params, weights + ([] if config.tied else ["head"]))
    leaves = paths.flatten(params)
    assert isinstance(model, LanguageModel)
    check_language_model(
        model,
        make_mixer=lambda segments: DenseMixer.of(segments, segments),
        rebuild=lambda transform: merge(definition, paths.update(params, {a: transform(leaves[a]) for a in chosen})),
    )


def test_caches_follow_the_windows() -> None:
    """An engine that keeps less than a layer sees answers wrongly, one that keeps more wastes memory."""
    mistral, qwen2 = (MODELS[name][0](MODELS[name][1], rngs=nnx.Rngs(0)) for name in ("mistral", "qwen2"))
    assert mistral.cache_specs() == (WindowCache(2, 2, 2, 3),) * 2
    build, config = MODELS["deepseek_v3"]
    assert build(config, rngs=nnx.Rngs(0)).cache_specs() == (LatentCache(6, 2),) * 2
    assert qwen2.cache_specs() == (FullCache(2, 2, 2), WindowCache(2, 2, 2, 2))


def test_auxiliary_values_of_layers_add_up(build: Any, small: Any) -> None:
    """A balancing loss counts some layers only, or each under another weight."""

    class Counted(Block):
        """A block that tells how many tokens it saw, the first one also their sum."""

        def transform(self, layer: int, x: Any, mixer: Any) -> Any:
            y, _, mixer = super().transform(layer, x, mixer)
            mine = {"first": (jnp.sum(x), jnp.float32(1))} if self.first else {}
            return y, {"tokens": (jnp.float32(x.shape[0]), jnp.float32(2)), **mine}, mixer

    model = build(dataclasses.replace(small, layers=3))
    for i, layer in enumerate(model.layers):
        layer.__class__, layer.first = Counted, i == 0
    tokens = jnp.arange(5, dtype=jnp.int32)
    _, aux, _ = model.hidden(tokens, tokens, DenseMixer.of(tokens[None]))
    assert set(aux) == {"tokens", "first"}
    assert (float(aux["tokens"][0]), float(aux["tokens"][1]), float(aux["first"][1])) == (15, 6, 1)


def test_positions_that_were_not_learned() -> None:
    """The row of another position would be a wrong number that nobody sees."""
    model = Gpt2(dataclasses.replace(MODELS["gpt2"][1], max_position=4), rngs=nnx.Rngs(0))
    for count in (4, 5):
        tokens = jnp.arange(count, dtype=jnp.int32)
        hidden, _, _ = model.hidden(tokens, tokens, DenseMixer.of(tokens[None]))
        assert np.isnan(hidden).all() if count > 4 else np.isfinite(hidden).all()


def test_a_model_for_longer_sequences() -> None:
    """Short factors beyond the original length give numbers that no model was trained for."""
    model = Phi3(MODELS["phi3"][1], rngs=nnx.Rngs(0))
    tokens = jnp.arange(12, dtype=jnp.int32)
    outs = [one.hidden(tokens, tokens, DenseMixer.of(tokens[None]))[0] for one in (model, model.for_length(16))]
    np.testing.assert_array_equal(*outs)
    longer, _, _ = model.for_length(17).hidden(tokens, tokens, DenseMixer.of(tokens[None]))
    assert not np.allclose(longer, outs[0])
    with pytest.raises(ValueError, match="length=0; expected at least 1"):
        model.for_length(0)


def test_a_family_of_ones_own(build: Any, tmp_path: Path) -> None:
    """A model that this package does not know is read and written by the family that is given."""

    class Doubled(Llama):
        """A Llama whose embeddings count twice."""

        def hidden(self, tokens: Any, positions: Any, mixer: Any, *, embeds: Any = None) -> Any:
            embeds = 2 * self.embedding.get_value()[tokens] if embeds is None else embeds
            return super().hidden(tokens, positions, mixer, embeds=embeds)

    family = dataclasses.replace(
        FAMILY,
        model=Doubled,
        config_map=dataclasses.replace(FAMILY.config_map, architecture="DoubledForCausalLM", model_type="doubled"),
    )
    folder = save_pretrained(build(), tmp_path / "model", family=family)
    with pytest.raises(ConfigError, match="DoubledForCausalLM"):
        from_pretrained(folder)
    model = from_pretrained(folder, family=family)
    tokens = jnp.arange(5, dtype=jnp.int32)
    got, _, _ = model.hidden(tokens, tokens, DenseMixer.of(tokens[None]))
    plain, _, _ = build().hidden(tokens, tokens, DenseMixer.of(tokens[None]))
    assert not np.allclose(got, plain)
    with pytest.raises(TypeError, match="is of no family of dovetail_models; pass family="):
        save_pretrained(model, tmp_path / "other")
    known = {place.partition(":")[0] for place in FAMILIES.values()}
    assert {type(config).__module__.rpartition(".")[2] for _, config in MODELS.values()} < known
    assert all(isinstance(config, family_of(config).config_map.config) for _, config in MODELS.values())
