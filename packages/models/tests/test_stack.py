"""Layers as a loop over stacked parameters compute what layers one by one compute, and are stored as they are."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import MODELS as FAMILIES
from model_toys import by_default

from dovetail_kernels import DenseMixer
from dovetail_models import (
    Gemma2,
    Gemma2Config,
    Llama,
    LlamaConfig,
    Mamba2,
    Mamba2Config,
    Qwen3Moe,
    Qwen3MoeConfig,
    Stack,
    from_pretrained,
    init,
    logical_axes,
    merge,
    save_pretrained,
    split,
    weight_map,
)
from dovetail_models.stack import Cycle, find_cycle
from dovetail_protocols import paths
from dovetail_protocols.testing import check_language_model
from dovetail_runtime import FSDP, mesh
from dovetail_weights import WeightsError, open_directory, save

SIZES = {"vocab_size": 24, "features": 8, "hidden": 12, "heads": 4, "kv_heads": 2, "init_std": 0.5}
EXPERTS = {"experts": 4, "top_k": 2, "expert_hidden": 6, "balanced": True}
RECURRENT = {"vocab_size": 24, "features": 8, "layers": 2, "heads": 2, "head_dim": 8, "state_size": 4, "groups": 1}
LLAMA = LlamaConfig(**SIZES, layers=4)
MODELS: dict[str, tuple[Any, Any, Cycle]] = {
    "equal": (Llama, LLAMA, Cycle(0, 1, 4)),
    "windows": (Gemma2, Gemma2Config(**SIZES, layers=5, windows=(3, None, 3, None, 3)), Cycle(0, 2, 2)),
    "dense first": (Qwen3Moe, Qwen3MoeConfig(**SIZES, layers=3, dense_layers=(0,), **EXPERTS), Cycle(1, 1, 2)),
    "recurrent": (Mamba2, Mamba2Config(**RECURRENT), Cycle(0, 1, 2)),
}  # fmt: skip


def deeper(name: str, config: Any) -> Any:
    """The configuration with twice the layers, so that they repeat."""
    each = [field for field in ("windows", "linear", "rotated") if isinstance(getattr(config, field, None), tuple)]
    more = {"scaled_by_layer": False} if name == "gpt2" else {}
    return dataclasses.replace(config, layers=4, **{field: getattr(config, field) * 2 for field in each}, **more)


ALL: dict[str, tuple[Any, Any, Cycle | None]] = {
    **MODELS,
    **{name: (build, deeper(name, config), None) for name, (build, config) in FAMILIES.items()},
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 9)), jnp.int32)


def both(model: Any) -> Any:
    """Logits, auxiliary values, and the gradients of a sum of them, as tensors of the checkpoint's names."""
    definition, params = split(model)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            model = merge(definition, params)
            positions = jnp.tile(jnp.arange(9, dtype=jnp.int32), 2)
            hidden, aux, _ = model.hidden(TOKENS.reshape(-1), positions, DenseMixer.of(TOKENS))
            logits = model.unembed(hidden)
            return jnp.sum(jnp.sin(logits)) + sum(total for total, _ in aux.values()), (logits, aux)

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return outputs, gradients

    return run(params)


@pytest.mark.parametrize("name", by_default(ALL, MODELS))
def test_scanned_is_unrolled(name: str, tmp_path: Path) -> None:
    """A switch that is meant to save compilation changes the numbers, or its checkpoints open nowhere else."""
    build, config, cycle = ALL[name]
    scanned = build(config, rngs=nnx.Rngs(0), scan=True)
    assert cycle is None or len(scanned.layers.cycle) == cycle.period
    assert len(list(scanned.layers)) == len(scanned.cache_specs()) == config.layers
    save_pretrained(scanned, tmp_path / "model")
    unrolled = from_pretrained(tmp_path / "model")
    again = from_pretrained(tmp_path / "model", scan=True)
    assert isinstance(again.layers, Stack)
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(scanned)[1])
    assert unrolled.cache_specs() == scanned.cache_specs()

    (logits, aux), gradients = both(scanned)
    (expected, expected_aux), wanted = both(unrolled)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert set(aux) == set(expected_aux)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), dict(aux), dict(expected_aux))
    mine, theirs = (
        open_directory(save(tmp_path / str(i), weight_map(config), tree)) for i, tree in enumerate((gradients, wanted))
    )
    assert set(mine) == set(theirs)
    for tensor in mine:
        scale = max(np.abs(theirs.read(tensor)).max(), 1e-3)
        np.testing.assert_allclose(mine.read(tensor) / scale, theirs.read(tensor) / scale, atol=1e-4, err_msg=tensor)


def test_the_values_are_those_of_the_layers() -> None:
    """The same seed makes the same model, stacked or not."""
    stacked, single = (split(Llama(LLAMA, rngs=nnx.Rngs(3), scan=scan))[1] for scan in (True, False))
    up = stacked["layers"]["cycle"][0]["mlp"]["up"]
    for i in range(4):
        np.testing.assert_array_equal(up[i], single["layers"][i]["mlp"]["up"])


def test_conformance() -> None:
    """Quantized weights are stacked, too."""
    model = Llama(LLAMA, rngs=nnx.Rngs(0), scan=True)
    definition, params = split(model)
    chosen = paths.select(params, ["layers/**/attention/{query,key,value,out}", "layers/**/mlp/*", "head"])
    leaves = paths.flatten(params)
    check_language_model(
        model,
        make_mixer=lambda segments: DenseMixer.of(segments, segments),
        rebuild=lambda transform: merge(definition, paths.update(params, {a: transform(leaves[a]) for a in chosen})),
    )


def test_a_mixer_with_caches_is_called_by_layer() -> None:
    """An engine that is given stacked parameters writes every layer's keys into the cache of one."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Noting:
        inner: Any
        seen: Any

        def attend(self, layer: int, *operands: Any, **options: Any) -> Any:
            out, _ = self.inner.attend(layer, *operands, **options)
            return out, Noting(self.inner, self.seen.at[layer].add(1))

    model = Llama(LLAMA, rngs=nnx.Rngs(0), scan=True)
    positions = jnp.tile(jnp.arange(9, dtype=jnp.int32), 2)
    dense = DenseMixer.of(TOKENS)
    hidden, _, after = model.hidden(TOKENS.reshape(-1), positions, Noting(dense, jnp.zeros(4)))
    np.testing.assert_array_equal(after.seen, np.ones(4))
    np.testing.assert_allclose(hidden, model.hidden(TOKENS.reshape(-1), positions, dense)[0], atol=1e-5)


def test_the_program_does_not_grow() -> None:
    """Compilation takes as long for many layers as for two; that is what the loop is for."""

    def size(layers: int, *, scan: bool) -> int:
        config = dataclasses.replace(LLAMA, layers=layers)
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), scan=scan))
        definition, params = split(model)
        positions = jnp.tile(jnp.arange(9, dtype=jnp.int32), 2)

        def loss(params: Any) -> jax.Array:
            hidden, _, _ = merge(definition, params).hidden(TOKENS.reshape(-1), positions, DenseMixer.of(TOKENS))
            return jnp.sum(hidden)

        return len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines())

    assert size(8, scan=True) < size(2, scan=True) + 50
    assert size(8, scan=False) > 1.5 * size(2, scan=False)


def test_on_a_mesh() -> None:
    """Stacked parameters have a first axis `layers` that the rules know, and are made where they belong."""
    build = lambda: Llama(dataclasses.replace(LLAMA, features=16), rngs=nnx.Rngs(0), scan=True)  # noqa: E731
    assert logical_axes(build())["layers"]["cycle"][0]["mlp"]["up"] == ("layers", "embed", "mlp")
    made = init(build, mesh(fsdp=8), FSDP)
    up = made.layers.cycle[0].mlp.up.get_value()
    assert up.addressable_shards[0].data.shape == (4, 2, 12)
    np.testing.assert_allclose(up, build().layers.cycle[0].mlp.up.get_value(), rtol=1e-6)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aa", Cycle(0, 1, 2)),
        ("abab", Cycle(0, 2, 2)),
        ("daaaa", Cycle(1, 1, 4)),
        ("wwwwwfwwwwwfww", Cycle(0, 6, 2)),
        ("xabcabcy", Cycle(1, 3, 2)),
        ("aabb", Cycle(0, 1, 2)),
    ],
)
def test_cycles(kinds: str, expected: Cycle) -> None:
    """A longer cycle than needed compiles more, a wrong one would mix layers."""
    assert find_cycle(kinds) == expected


def test_nothing_repeats() -> None:
    """A loop that is asked for and cannot be is an error."""
    with pytest.raises(ValueError, match="none of 1 layers is followed by one of its kind"):
        Llama(dataclasses.replace(LLAMA, layers=1), rngs=nnx.Rngs(0), scan=True)


def test_a_checkpoint_of_other_depth(tmp_path: Path) -> None:
    """Layers that are missing are named as the checkpoint would name them."""
    folder = save_pretrained(Llama(LLAMA, rngs=nnx.Rngs(0)), tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 6'))
    with pytest.raises(WeightsError, match=r"model\.layers\.4\."):
        from_pretrained(folder, scan=True)
