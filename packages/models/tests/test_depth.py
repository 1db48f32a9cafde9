"""If these fail, layers of a deeper or shallower model are not those of their source, or it begins as another one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, FEW, MODELS, by_default
from surgery_toys import TOKENS, encoded, flat, made, same

from dovetail_kernels import DenseMixer
from dovetail_models import (
    Block,
    Decoder,
    Family,
    Gemma3Multimodal,
    Gpt2,
    LazyModel,
    LlamaConfig,
    from_pretrained,
    lazy,
    merge,
    prune_layers,
    repeat_layers,
    save_pretrained,
    split,
)
from dovetail_models.layer_lists import facts
from dovetail_models.llama import FAMILY

ORDERS = {
    name: [0, 0, 1, 1] if hasattr(config, "first_dense") else [0, 1, 0, 1] for name, (_, config) in MODELS.items()
}


def deeper(name: str) -> Any:
    """Return a small model whose configuration can say what its copies are."""
    if name != "gpt2":
        return made(name)
    kind, config = MODELS[name]
    return kind(dataclasses.replace(config, scaled_by_layer=False), rngs=nnx.Rngs(0))


def composed(model: Any, order: list[int]) -> Any:
    """Return the model with its own layers in that order, whatever its configuration says."""
    copy = merge(*split(model))
    copy.layers = nnx.List([merge(*split(copy.layers[i])) for i in order])
    return copy


@pytest.mark.parametrize("name", by_default(MODELS, FEW))
def test_layers_are_those_of_their_source(name: str, logits: Any, tmp_path: Path) -> None:
    """Windows, positions, experts and kinds of mixing go with the layer, also through config.json."""
    model, order = deeper(name), ORDERS[name]
    deep = repeat_layers(model, order)
    assert deep.config.layers == len(order)
    np.testing.assert_array_equal(logits(deep, TOKENS), logits(composed(model, order), TOKENS))
    assert abs(logits(deep, TOKENS) - logits(model, TOKENS)).max() > 0.01
    written = repeat_layers(save_pretrained(model, tmp_path / "a"), order)
    assert isinstance(written, LazyModel)
    again = from_pretrained(written.save(tmp_path / "b"))
    same(again, deep)
    assert [facts(layer) for layer in again.layers] == [facts(layer) for layer in deep.layers]


@pytest.mark.parametrize("name", by_default(MODELS, FEW))
def test_copies_with_zero_outputs_add_nothing(name: str, logits: Any) -> None:
    """Training goes on where it was."""
    model = deeper(name)
    deep = repeat_layers(model, ORDERS[name], zero=True)
    np.testing.assert_allclose(logits(deep, TOKENS), logits(model, TOKENS), atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral"])
def test_copies_with_zero_outputs_learn(name: str, logits: Any) -> None:
    """What leads out of them has gradients of a usual size."""
    definition, params = split(repeat_layers(made(name), [0, 1, 0, 1], zero=True))
    grads = jax.grad(lambda params: jnp.sum(logits(merge(definition, params), TOKENS) ** 2))(params)["layers"]
    sizes = [max(float(abs(x).max()) for x in jax.tree.leaves(grads[place])) for place in range(4)]
    assert min(sizes[2:]) > 0.01 * max(sizes[:2])


def test_zero_outputs_are_the_products_or_the_norms_behind_them() -> None:
    """What is zero, and nothing else."""
    for name, zero in (
        ("mistral", {"attention/out", "mlp/down"}),
        ("gpt_oss", {"attention/out", "attention/out_bias", "mlp/experts/down", "mlp/experts/down_bias"}),
        ("deepseek_v2", {"attention/out", "mlp/experts/down", "mlp/shared/down", "mlp/shared/down_bias"}),
        ("mamba2", {"attention/out", "attention/out_bias"}),
        ("olmo2", {"attention_out_norm/weight", "mlp_out_norm/weight"}),
        ("gemma2", {"attention_out_norm/weight", "mlp_out_norm/weight"}),
    ):
        model = made(name)
        before, after = flat(model), flat(repeat_layers(model, [0, 1, 1], zero=True))
        found = {
            a.removeprefix("layers/2/")
            for a, value in after.items()
            if a.startswith("layers/2/") and (value != before[a.replace("/2/", "/1/")]).any()
        }
        assert found == zero, name
        assert all(set(after[f"layers/2/{a}"].reshape(-1)) == {-1.0 if name == "gemma2" else 0.0} for a in zero), name


def test_stacked_layers_and_options_stay(build: Any, small: Any, logits: Any) -> None:
    model = build(dataclasses.replace(small, layers=3), scan=True, remat="full", dtype=jnp.bfloat16)
    deep = repeat_layers(model, [0, 1, 2, 1, 2])
    assert (
        split(deep)[0]
        == split(build(dataclasses.replace(small, layers=5), scan=True, remat="full", dtype=jnp.bfloat16))[0]
    )
    up = flat(model)["layers/cycle/0/mlp/up"]
    np.testing.assert_array_equal(flat(deep)["layers/cycle/0/mlp/up"], up[[0, 1, 2, 1, 2]])


@pytest.mark.parametrize("name", by_default(ENCODERS, ("bert", "siglip", "t5")))
def test_encoders(name: str) -> None:
    """Those that normalise what goes in begin as they were; those that normalise sums cannot."""
    model, at = made(name), "vision/layers" if name == "siglip" else None
    if name in ("bert", "masked_lm"):
        with pytest.raises(ValueError, match="norm of the sum"):
            repeat_layers(model, [0, 1, 1], zero=True, at=at)
        assert repeat_layers(model, [0, 1, 1], at=at).config.layers == 3
        return
    deep = repeat_layers(model, [0, 1, 0], zero=True, at=at)
    np.testing.assert_allclose(encoded(name, deep), encoded(name, model), atol=1e-6)
    assert abs(encoded(name, repeat_layers(model, [0, 1, 0], at=at)) - encoded(name, model)).max() > 1e-3
    with pytest.raises(ValueError, match="at='layer'"):
        repeat_layers(model, [0], at="layer")


def test_a_model_inside_another(tmp_path: Path) -> None:
    """The decoder or the encoder of a multimodal model, by the address of its layers."""
    from test_multimodal import CONFIG

    model = Gemma3Multimodal(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\['text/layers', 'vision/layers'\]; pass at="):
        repeat_layers(model, [0])
    deep = repeat_layers(model, [0, 1, 1], at="text/layers")
    assert (deep.config.text.layers, deep.config.vision) == (3, model.config.vision)
    np.testing.assert_array_equal(flat(deep)["text/layers/2/mlp/up"], flat(model)["text/layers/1/mlp/up"])
    same(from_pretrained(save_pretrained(deep, tmp_path / "a")), deep)


def test_heads_that_look_ahead_stay(logits: Any) -> None:
    """Their layer follows the last one, whatever its number."""
    model = made("deepseek_v3")
    deep, places = repeat_layers(model, [0, 1, 1], zero=True), jnp.tile(jnp.arange(6, dtype=jnp.int32), 2)
    looked = []
    for each in (model, deep):
        mixer, tokens = DenseMixer.of(TOKENS), TOKENS.reshape(-1)
        hidden, _, _ = each.hidden(tokens, places, mixer)
        looked.append(each.look_ahead(hidden, tokens, places, mixer)[0])
    np.testing.assert_allclose(looked[1], looked[0], atol=1e-6)


def test_pruned_layers(build: Any, small: Any, logits: Any) -> None:
    model = build(dataclasses.replace(small, layers=4))
    np.testing.assert_array_equal(logits(prune_layers(model, [2, 0]), TOKENS), logits(composed(model, [1, 3]), TOKENS))
    for wrong in ([], [4], [-1], [1, 1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="layers: "):
            prune_layers(model, wrong)


def test_kinds_that_a_configuration_cannot_say() -> None:
    """Named with what differs, and with the layers that would fit."""
    with pytest.raises(
        ValueError, match=r"layer 1 cannot be .* layer 1: DeepseekV2Config .*type='GatedMLP'.*fit there: \[0\]"
    ):
        repeat_layers(made("deepseek_v2"), [0, 1, 0])
    with pytest.raises(
        ValueError, match=r"layer 1 cannot be .* layer 0: Gpt2Config .*attention/scale=.*fit there: \[1\]"
    ):
        repeat_layers(made("gpt2"), [0, 0])
    assert isinstance(repeat_layers(made("gpt2"), [0]), Gpt2)


def test_bad_orders(build: Any, small: Any) -> None:
    model = build(dataclasses.replace(small, layers=2))
    for wrong in ([], [2], [0, -1]):
        with pytest.raises(ValueError, match=r"order: .*each from 0 to 1"):
            repeat_layers(model, wrong)
    for early in ([1, 0], [0, 0], [1, 0, 1]):
        with pytest.raises(ValueError, match="does not begin as it was"):
            repeat_layers(model, early, zero=True)


class Odd(Decoder):
    """A family whose layers lead out through parameters of other names."""

    @staticmethod
    def block(config: LlamaConfig, index: int, **weights: Any) -> Any:
        del index
        block = Block(
            config, config.attention(**weights), nnx.Linear(8, 8, rngs=weights["rngs"]), dtype=weights["dtype"]
        )
        block.attention = nnx.Dict(query=block.attention.query)
        return block


def test_families_whose_outputs_are_unknown_are_refused() -> None:
    config = LlamaConfig(vocab_size=8, features=8, hidden=8, layers=1, heads=2)
    family = Family(Odd, FAMILY.config_map, FAMILY.weight_map)
    tensors = lazy(FAMILY.model(config, rngs=nnx.Rngs(0))).tensors
    kept = {a: x for a, x in tensors.items() if "/attention/query" in a or "layers" not in a}
    with pytest.raises(ValueError, match="no parameters like"):
        repeat_layers(LazyModel(family, config, kept), [0, 0], zero=True)


def test_indices_are_integers(build: Any, untyped: None) -> None:
    with pytest.raises(TypeError, match="integer"):
        repeat_layers(build(), [0.5])  # pyright: ignore[reportArgumentType]
