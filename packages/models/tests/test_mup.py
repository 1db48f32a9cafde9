"""Maximal update parametrisation: the factors in closed form, and updates whose effect does not grow with the width."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model_toys import MODELS

from dovetail_kernels import DenseMixer
from dovetail_models import (
    BertConfig,
    BertModel,
    DeepseekV2,
    Gemma2,
    Llama,
    LlamaConfig,
    MistralConfig,
    Qwen3Moe,
    abstract,
    maximal_update,
    merge,
    split,
)
from dovetail_models.mup import WIDTHS
from dovetail_protocols import paths

HIDDEN = re.compile(
    r".*/(query|key|value|gate|out|up|down|latent|query_latent|join|in_(gate|x|b|c|dt))"
    r"|.*/in_(query|key|value|strength|decay)"
)
OUTPUT = re.compile(r"head|.*/router/weight|.*/share|.*/rope_key")
BASE = LlamaConfig(vocab_size=32, features=16, hidden=24, layers=2, heads=4, kv_heads=2, attention_bias=True)
WIDE = dataclasses.replace(BASE, features=64, hidden=48, heads=16, kv_heads=2)


def doubled(config: Any) -> Any:
    """The configuration of twice every width."""
    widths = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in WIDTHS}
    return dataclasses.replace(config, **{name: 2 * n for name, n in widths.items() if n is not None})


def of_ones(build: Any, config: Any, **options: Any) -> Any:
    """A model whose weights are 1, so that the new ones are the factors."""
    definition, shapes = abstract(lambda: build(config, rngs=nnx.Rngs(0), **options))
    return merge(definition, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))


def factors(model: Any, base: Any) -> dict[str, tuple[float, float]]:
    """Of every parameter, those of its standard deviation and of its learning rate."""
    made, rates = maximal_update(model, base=base)
    assert split(made)[0] == split(model)[0]
    weights, flat = paths.flatten(split(made)[1]), paths.flatten(rates)
    assert all(np.ptp(weight) == 0 for weight in weights.values())
    return {name: (float(weights[name].reshape(-1)[0]), flat[name]) for name in weights}


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str) -> None:
    """A weight of some family that is taken for another kind keeps updates that grow with the width."""
    build, config = MODELS[name]
    config = dataclasses.replace(config, tied=False)
    grown = (doubled(config).embedding_scale / config.embedding_scale) ** -1
    for address, found in factors(of_ones(build, doubled(config)), config).items():
        hidden, output = HIDDEN.fullmatch(address), OUTPUT.fullmatch(address)
        wanted = (0.5**0.5, 0.5) if hidden else (0.5, 0.5) if output else (1.0, 1.0)
        wanted = (grown, grown) if address == "embedding" else wanted
        assert found == pytest.approx(wanted), address


def test_closed_form() -> None:
    """Widths that grow by different factors; key-value heads of a fixed number are outputs."""
    every = factors(of_ones(Llama, WIDE), BASE).items()
    assert {name.removeprefix("layers/1/"): pair for name, pair in every if "layers/0" not in name} == {
        "embedding": (1, 1),
        "attention_norm/weight": (1, 1),
        "mlp_norm/weight": (1, 1),
        "norm/weight": (1, 1),
        "attention/query": pytest.approx((0.5, 0.25)),
        "attention/key": pytest.approx((0.25, 0.25)),
        "attention/value": pytest.approx((0.25, 0.25)),
        "attention/out": pytest.approx((0.5, 0.25)),
        "mlp/gate": pytest.approx((0.5, 0.25)),
        "mlp/up": pytest.approx((0.5, 0.25)),
        "mlp/down": pytest.approx((0.5**0.5, 0.5)),
        "head": pytest.approx((0.25, 0.25)),
        **{f"attention/{name}_bias": (1, 1) for name in ("query", "key", "value", "out")},
    }


def test_latents_of_a_fixed_size() -> None:
    """What makes a latent is an output, what expands it an input: only one of its sides grows."""
    config = dataclasses.replace(MODELS["deepseek_v2"][1], query_rank=5, tied=False)
    wide = dataclasses.replace(doubled(config), latent_dim=config.latent_dim, query_rank=5)
    found = factors(of_ones(DeepseekV2, wide), config)
    for name in ("latent", "query_latent", "rope_key"):
        assert found[f"layers/0/attention/{name}"] == (0.5, 0.5)
    for name in ("key", "value", "query"):
        assert found[f"layers/0/attention/{name}"] == (1, 1)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2"])
def test_stacked_layers(name: str) -> None:
    """Axes that count layers and experts are no width."""
    build, config = {"qwen3_moe": Qwen3Moe, "gemma2": Gemma2}[name], MODELS[name][1]
    changed: dict[str, Any] = {"layers": 4, "tied": False}
    config = dataclasses.replace(config, **changed | ({"windows": (3, None) * 2} if name == "gemma2" else {}))
    single, stacked = (factors(of_ones(build, doubled(config), scan=scan), config) for scan in (False, True))
    assert any("layers/cycle/1" in address for address in stacked)
    for address, pair in stacked.items():
        assert pair == single[address.replace("layers/cycle/", "layers/")]


def test_the_base_itself_and_shapes_alone() -> None:
    """At the base's widths nothing changes, and a model that fits no machine can be planned."""
    plain = Llama(BASE, rngs=nnx.Rngs(0))
    made, rates = maximal_update(plain, base=BASE)
    jax.tree.map(np.testing.assert_array_equal, split(made)[1], split(plain)[1])
    assert set(jax.tree.leaves(rates)) == {1}
    large = dataclasses.replace(BASE, features=2**16, heads=2**14, kv_heads=2**13, hidden=2**18)
    shapes = nnx.eval_shape(lambda: Llama(large, rngs=nnx.Rngs(0)))
    made, rates = maximal_update(shapes, base=BASE)
    assert split(made)[1]["head"] == jax.ShapeDtypeStruct((2**16, 32), jnp.float32)
    assert rates["head"] == 2.0**-12


def changes(features: int, base: int | None) -> tuple[float, float]:
    """How much three steps of Adam change hidden states and logits of a Llama: root mean squares."""
    config, small = (
        LlamaConfig(vocab_size=64, features=n, hidden=2 * n, layers=2, heads=n // 16, init_std=64**-0.5)
        for n in (features, base or features)
    )
    model, rates = maximal_update(Llama(config, rngs=nnx.Rngs(0)), base=small)
    definition, params = split(model)
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 17)), jnp.int32)
    tokens, targets = rows[:, :-1], rows[:, 1:].reshape(-1)
    positions = jnp.tile(jnp.arange(16, dtype=jnp.int32), 4)
    scaled = optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, rates))
    optimizer = optax.chain(optax.scale_by_adam(), scaled, optax.scale_by_learning_rate(1e-3))

    def outputs(params: Any) -> tuple[jax.Array, jax.Array]:
        model = merge(definition, params)
        hidden, _, _ = model.hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
        return hidden, model.unembed(hidden)

    def loss(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(outputs(params)[1], targets).mean()

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: Any) -> Any:
        (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
        return [jnp.sqrt(jnp.mean((b - a) ** 2)) for a, b in zip(outputs(params), outputs(after), strict=True)]

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        hidden, logits = run(params)
    return float(hidden), float(logits)


def test_coordinates() -> None:
    """Updates of a wide model change its logits by more than those of the base: its best learning rate is another."""
    base = changes(64, 64)
    wide, standard = changes(512, 64), changes(512, None)
    for before, after in zip(base, wide, strict=True):
        assert 0.5 < after / before < 1.1
    assert standard[0] / base[0] > 1.3  # of norms
    assert standard[1] / base[1] > 4


@pytest.mark.usefixtures("untyped")
def test_refusals() -> None:
    """A base of which nothing follows for the model is told, with what differs."""
    plain = nnx.eval_shape(lambda: Llama(WIDE, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="base is MistralConfig; expected LlamaConfig"):
        maximal_update(plain, base=MistralConfig(vocab_size=32, features=16, hidden=24, layers=2, heads=4))
    for change, message in (
        ({"layers": 3}, "layers=2 and base.layers=3"),
        ({"heads": 2}, "dim=4 and base.dim=8"),
        ({"init_std": 0.1, "vocab_size": 9}, "init_std=0.02 and base.init_std=0.1; vocab_size=32 and base.vocab_size"),
        ({"tied": True}, "base.tied=True; a matrix that embeds and unembeds needs a multiplier"),
    ):
        with pytest.raises(ValueError, match=message):
            maximal_update(plain, base=dataclasses.replace(BASE, **change))
    bert = BertConfig(vocab_size=32, features=16, hidden=24, layers=1, heads=4)
    with pytest.raises(TypeError, match="BertModel is no Decoder"):
        maximal_update(nnx.eval_shape(lambda: BertModel(bert, rngs=nnx.Rngs(0))), base=bert)  # pyright: ignore
