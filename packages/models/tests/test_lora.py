"""If these fail, an adapter starts with a change, computes something else than when merged, or spoils its base."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model_toys import ENCODERS, MODELS

from dovetail_kernels import DenseMixer
from dovetail_models import (
    LORA,
    add_lora,
    describe,
    init,
    lazy,
    lora_of,
    merge,
    merge_lora,
    remove_lora,
    save_pretrained,
    split,
    with_lora,
)
from dovetail_models.lora import division
from dovetail_models.state import placements, variables
from dovetail_protocols import paths
from dovetail_protocols.paths import PatternError
from dovetail_protocols.testing import FakeQuantized
from dovetail_runtime import EXPERT, FSDP_TENSOR, batch_sharding, mesh, use

TOKENS = np.random.default_rng(0).integers(0, 24, (2, 7)).astype(np.int32)
OFTEN = {
    "lora": ("deepseek_v3", "gemma2", "siglip"),
    "dora": ("gpt2", "gpt_oss", "mamba2"),
}
DENSE = ["layers/**/mlp/{gate,up,down}", "layers/**/attention/{query,key,value,out}", "embedding", "head"]


def weights(model: Any) -> list[str]:
    """Every parameter that can have an adapter."""

    def can(address: str, variable: Any) -> bool:
        try:
            return bool(division(address, variable))
        except ValueError:
            return False

    return [address for address, variable in variables(model).items() if can(address, variable)]


def filled(model: Any, seed: int = 0) -> Any:
    """Return the model with adapters that do something: none of their arrays is 0."""
    definition, params = split(model)
    rng = np.random.default_rng(seed)
    chosen = paths.select(params, LORA)
    drawn = {a: jnp.asarray(rng.uniform(0.1, 0.6, paths.flatten(params)[a].shape), jnp.float32) for a in chosen}
    return merge(definition, paths.update(params, drawn))


def out(model: Any) -> jax.Array:
    """Logits of a decoder, or what an encoder gives."""
    if not hasattr(model, "cache_specs"):
        rng = np.random.default_rng(1)
        time = min(model.config.max_position, 6)
        given = jax.tree.map(lambda x: jnp.asarray(rng.uniform(1, 3, x.shape), x.dtype), model.example(time))
        return jax.tree.leaves(model(*given))[0]
    positions = jnp.tile(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape[0])
    hidden, _, _ = model.hidden(jnp.asarray(TOKENS.reshape(-1)), positions, DenseMixer.of(jnp.asarray(TOKENS)))
    return model.unembed(hidden)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if name in often else pytest.mark.soak)
        for kind, often in OFTEN.items()
        for name in MODELS | ENCODERS
    ],
)
def test_every_weight_of_every_family(kind: str, name: str) -> None:
    """All products and lookups take adapters, which change nothing at first, and then what their sums do."""
    build, config = (MODELS | ENCODERS)[name]
    base = build(config, rngs=nnx.Rngs(0))
    model = add_lora(base, weights(base), rank=2, alpha=3.0, rngs=nnx.Rngs(1), dora=kind == "dora")
    before = jax.jit(lambda params: out(merge(split(base)[0], params)))(split(base)[1])
    run = jax.jit(lambda params: out(merge(split(model)[0], params)))
    largest = float(jnp.abs(before).max())
    np.testing.assert_allclose(run(split(model)[1]), before, atol=1e-5 * largest)
    changed = filled(model)
    got = run(split(changed)[1])
    merged = merge_lora(changed)
    assert split(merged)[0] == split(base)[0]
    wanted = jax.jit(lambda params: out(merge(split(base)[0], params)))(split(merged)[1])
    np.testing.assert_allclose(got, wanted, atol=2e-4 * float(jnp.abs(wanted).max()))
    assert float(jnp.abs(wanted - before).max()) > 1e-2 * largest


def test_plain_adapters_start_bit_by_bit_the_same(build: Any) -> None:
    base = build()
    for patterns in (DENSE, "layers/0/mlp/*"):
        model = add_lora(base, patterns, rank=3, rngs=nnx.Rngs(1))
        np.testing.assert_array_equal(out(model), out(base))


def test_a_merge_is_the_formula_in_float64(build: Any) -> None:
    base = build()
    model = filled(add_lora(base, "layers/0/mlp/up", rank=3, alpha=6.0, rngs=nnx.Rngs(1)))
    found = model.layers[0].mlp.up.get_value()
    expected = np.asarray(found.base, np.float64) + 2.0 * np.asarray(found.a, np.float64) @ np.asarray(
        found.b, np.float64
    )
    np.testing.assert_allclose(merge_lora(model).layers[0].mlp.up.get_value(), expected, atol=1e-6)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_scales(build: Any, rslora: bool, scale: float) -> None:
    """Alpha over the rank, or over its root (arXiv:2312.03732)."""
    model = add_lora(build(), "embedding", rank=4, alpha=8.0, rslora=rslora, rngs=nnx.Rngs(1))
    assert model.embedding.get_value().scale == scale


def test_taking_adapters_off_gives_the_base_back(build: Any) -> None:
    """Bit by bit, also after other adapters were trained and merged."""
    base = build(param_dtype=jnp.bfloat16, dtype=jnp.float32)
    model = filled(add_lora(base, DENSE, rank=2, rngs=nnx.Rngs(1)))
    merged = merge_lora(model)
    assert split(merged)[1]["embedding"].dtype == jnp.bfloat16
    same = jax.tree.map(lambda a, b: a is b, split(remove_lora(model))[1], split(base)[1])
    assert jax.tree.all(same)


def test_initial_values(build: Any) -> None:
    """Uniform for products as for linear layers, with float32 whatever the weight's dtype; embeddings learn by rows."""
    model = add_lora(build(param_dtype=jnp.bfloat16), DENSE, rank=64, rngs=nnx.Rngs(1))
    found = variables(model)
    w, table = found["layers/0/mlp/down"].get_value(), found["embedding"].get_value()
    bound = w.shape[0] ** -0.5
    assert w.a.dtype == w.b.dtype == jnp.float32
    assert bound * 0.9 < float(jnp.abs(w.a).max()) <= bound
    assert not w.b.any()
    assert not table.a.any()
    assert 0.9 < float(table.b.std()) < 1.1
    other = add_lora(build(), DENSE, rank=2, rngs=nnx.Rngs(1), dtype=jnp.bfloat16)
    assert variables(other)["head"].get_value().a.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "dora"),
    [
        ("gemma2", True),
        *(pytest.param(name, True, marks=pytest.mark.soak) for name in ("mixtral", "qwen3")),
        *(pytest.param(name, False, marks=pytest.mark.soak) for name in ("gemma2", "mixtral", "qwen3")),
    ],
)
def test_stacked_layers(name: str, dora: bool) -> None:
    """The adapters of layers in a loop are stacked like their weights; logits are those of layers one by one."""
    kind, config = MODELS[name]
    windows = {"windows": config.windows * 2} if name == "gemma2" else {}
    config = dataclasses.replace(config, layers=4, **windows)
    single, stacked = (kind(config, rngs=nnx.Rngs(0), scan=scan) for scan in (False, True))
    adapter = lora_of(filled(add_lora(single, weights(single), rank=2, rngs=nnx.Rngs(1), dora=dora)))
    model = with_lora(stacked, adapter)
    np.testing.assert_allclose(out(model), out(with_lora(single, adapter)), atol=1e-4)
    np.testing.assert_allclose(out(model), out(merge_lora(model)), atol=1e-4)
    assert variables(model)["layers/cycle/0/attention/query"].get_value().a.shape[0] in (2, 4)
    started = add_lora(stacked, "layers/**/attention/{query,value}", rank=2, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(out(started), out(stacked))


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.soak), True])
def test_quantized_bases(build: Any, small: Any, scan: bool) -> None:
    """With a quantized base the numbers are those with the same base in floats."""
    base = build(dataclasses.replace(small, layers=2), scan=scan)
    definition, params = split(base)
    fake = FakeQuantized.of(params, DENSE)
    dense, quantized = (
        filled(add_lora(merge(definition, p), DENSE, rank=2, rngs=nnx.Rngs(1), dora=True)) for p in fake
    )
    np.testing.assert_allclose(out(quantized), out(dense), atol=1e-4)
    restored = split(remove_lora(quantized))[1]
    jax.tree.map(np.testing.assert_array_equal, restored, fake.quantized)
    with pytest.raises(ValueError, match="embedding: the base is quantized"):
        merge_lora(quantized)


def test_only_adapters_train(build: Any, objective: Any, small: Any) -> None:
    """The patterns that choose parameters choose what an optimizer changes; nothing else moves, or has a state."""
    model = filled(add_lora(build(), ["layers/*/mlp/{up,down}", "embedding"], rank=2, rngs=nnx.Rngs(1), dora=True))
    definition, params = split(model)
    mask = paths.mask(params, LORA)
    rest = jax.tree.map(lambda chosen: not chosen, mask)
    optimizer = optax.chain(optax.masked(optax.sgd(1e-2, momentum=0.9), mask), optax.masked(optax.set_to_zero(), rest))
    state = optimizer.init(params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 3 * 3  # of a, b and magnitude of three weights

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradients = jax.grad(objective(definition))(params, jnp.asarray(TOKENS))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    after, _ = step(params, state)
    chosen = set(paths.select(params, LORA))
    assert "layers/0/mlp/up/a" in chosen
    for address, old in paths.flatten(params).items():
        assert np.array_equal(paths.flatten(after)[address], old) == (address not in chosen), address


def test_an_adapter_alone_is_trained(build: Any, objective: Any) -> None:
    """Gradients of the adapter's tree are those of its places in the model, and of its size; bases may be quantized."""
    definition, params = split(build())
    base = merge(definition, FakeQuantized.of(params, DENSE).quantized)
    model = filled(add_lora(base, DENSE, rank=2, rngs=nnx.Rngs(1)))

    @jax.jit
    def gradient(adapter: Any, params: Any) -> Any:
        def loss(adapter: Any) -> Any:
            definition, whole = split(with_lora(merge(split(base)[0], params), adapter))
            return objective(definition)(whole, jnp.asarray(TOKENS))

        return jax.grad(loss)(adapter)

    found = gradient(lora_of(model), split(base)[1])
    assert jax.tree.structure(found) == jax.tree.structure(lora_of(model))
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(found))


def test_no_gradient_of_a_base_is_made(build: Any, objective: Any, small: Any) -> None:
    """The compiled gradient of adapters of all layers holds nothing of the size of a weight's gradient."""
    model = add_lora(build(dataclasses.replace(small, hidden=40)), DENSE[:2], rank=2, rngs=nnx.Rngs(1))
    definition, params = split(model)
    flat = paths.flatten(params)
    chosen = {address: flat[address] for address in paths.select(params, LORA)}

    def made(train: Any) -> list[str]:
        def loss(some: Any, params: Any) -> Any:
            return objective(definition)(paths.update(params, some), jnp.asarray(TOKENS))

        text = jax.jit(jax.grad(loss)).lower(train, params).compile().as_text()
        return re.findall(
            r"= f32\[(?:16,40|40,16)\]\S* (?!parameter|copy|bitcast|transpose|get-tuple|reshape)(\S+)\(", text
        )

    assert made(chosen) == []
    assert made(flat)  # or this test sees nothing


@pytest.mark.parametrize(
    ("name", "sizes", "rules", "dora"),
    [
        ("qwen3", {"data": 2, "fsdp": 2, "tensor": 2}, FSDP_TENSOR, False),
        ("gpt2", {"data": 2, "fsdp": 2, "tensor": 2}, FSDP_TENSOR, True),
        *(
            pytest.param("mixtral", {"fsdp": 2, "expert": 4}, EXPERT, dora, marks=pytest.mark.soak)
            for dora in (False, True)
        ),
    ],
)
def test_on_a_mesh(name: str, sizes: Any, rules: Any, dora: bool, objective: Any) -> None:
    """Bases are divided as without adapters, thin arrays along the same axes; loss and gradients are one device's."""
    kind, config = MODELS[name]
    plain = kind(config, rngs=nnx.Rngs(0))
    model = filled(add_lora(plain, weights(plain), rank=2, rngs=nnx.Rngs(1), dora=dora))
    definition, params = split(model)
    grid, chosen = mesh(**sizes), paths.select(params, LORA)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 16)).astype(np.int32)

    @jax.jit
    def run(params: Any, tokens: Any) -> Any:
        flat = paths.flatten(params)
        some = {address: flat[address] for address in chosen}
        return jax.value_and_grad(lambda some: objective(definition)(paths.update(params, some), tokens))(some)

    loss, gradients = run(params, tokens)
    places = placements(model, grid, rules)
    axis = "layers/0/mlp/experts/up" if name == "mixtral" else "layers/0/mlp/up"
    flat = paths.flatten(places)
    assert flat[f"{axis}/b"].spec[0] == flat[f"{axis}/base"].spec[0] if name == "mixtral" else True
    assert any(part for part in flat[f"{axis}/a"].spec)
    with use(grid, rules):
        got = run(jax.device_put(params, places), jax.device_put(tokens, batch_sharding(grid, rules)))
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, largest)), got[1], gradients)


def test_made_on_a_mesh(build: Any) -> None:
    grid = mesh(data=2, fsdp=2, tensor=2)
    model = init(lambda: add_lora(build(), DENSE, rank=2, rngs=nnx.Rngs(1), dora=True), grid, FSDP_TENSOR)
    jax.tree.map(
        lambda x, place: x.sharding == place or pytest.fail(str(x.sharding)),
        split(model)[1],
        placements(model, grid, FSDP_TENSOR),
    )
    merged = merge_lora(model)
    jax.tree.map(
        lambda x, place: x.sharding == place or pytest.fail(str(x.sharding)),
        split(merged)[1],
        placements(merged, grid, FSDP_TENSOR),
    )
    quantized = merge(split(build())[0], FakeQuantized.of(split(build())[1], DENSE).quantized)
    assert paths.flatten(placements(quantized, grid, FSDP_TENSOR))["layers/0/mlp/up/qvalue"].spec


def test_descriptions_count_adapters(build: Any) -> None:
    base = build()
    found = describe(add_lora(base, "layers/*/mlp/up", rank=2, rngs=nnx.Rngs(1)), time=4)
    assert found.parameters == describe(base, time=4).parameters + 2 * sum(base.layers[0].mlp.up.get_value().shape)
    assert set(found.groups) == set(describe(base, time=4).groups)


def test_adapted_models_are_not_written_as_plain_ones(build: Any, tmp_path: Any) -> None:
    model = add_lora(build(), "layers/*/mlp/up", rank=2, rngs=nnx.Rngs(1))
    for refused in (lambda: lazy(model), lambda: save_pretrained(model, tmp_path / "a")):
        with pytest.raises(ValueError, match=r"adapted parameters \(layers/0/mlp/up\); expected merge_lora"):
            refused()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no match": (
        {"patterns": "layers/*/attn/*"},
        PatternError,
        "'layers/\\*/attn/\\*' matches no leaf; .*layers/0/attention",
    ),
    "a norm": ({"patterns": "norm/weight"}, ValueError, r"norm/weight: a parameter \(16,\) that is neither"),
    "norms among weights": ({"patterns": "layers/0/**"}, ValueError, "layers/0/attention_norm/weight"),
    "rank": ({"rank": 0}, ValueError, "rank=0; expected an integer of at least 1"),
    "half a rank": ({"rank": 1.5}, ValueError, "rank=1.5"),
    "alpha": ({"alpha": -1.0}, ValueError, "alpha=-1.0"),
    "alpha that is no number": ({"alpha": float("nan")}, ValueError, "alpha=nan"),
    "dtype": ({"dtype": jnp.int32}, ValueError, "dtype=.*int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, build: Any, untyped: None) -> None:
    changed, kind, match = BAD[name]
    given = {"patterns": "embedding", "rank": 2, "rngs": nnx.Rngs(0)} | changed
    with pytest.raises(kind, match=match):
        add_lora(build(), given.pop("patterns"), **given)


def test_what_does_not_fit_is_named(build: Any) -> None:
    base = build()
    with pytest.raises(ValueError, match="Llama has no adapters"):
        merge_lora(base)
    with pytest.raises(ValueError, match="Llama has no adapters"):
        remove_lora(base)
    model = add_lora(base, "embedding", rank=2, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="embedding: has an adapter already"):
        add_lora(model, "embedding", rank=2, rngs=nnx.Rngs(1))
    definition, params = split(base)
    spoilt = merge(definition, paths.update(params, {"head": params["head"].at[0, 0].set(jnp.nan)}))
    with pytest.raises(ValueError, match="head: holds NaN"):
        add_lora(spoilt, "head", rank=2, rngs=nnx.Rngs(1))
    definition, params = split(model)
    spoilt = merge(definition, paths.update(params, {"embedding/b": jnp.full((2, 16), jnp.nan)}))
    with pytest.raises(ValueError, match="embedding with its adapter: holds NaN"):
        merge_lora(spoilt)
