"""What training adds to a router: losses and statistics in closed form, capacity, replayed choices, on meshes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model_toys import MODELS
from test_moe import WEIGHTS, sparse

from dovetail_kernels import DenseMixer
from dovetail_models import (
    DeepseekV3,
    Mixtral,
    MixtralConfig,
    Router,
    Selection,
    SparseMLP,
    SparseTraining,
    merge,
    split,
)
from dovetail_models import placements as placements_of
from dovetail_models.balance import real_tokens
from dovetail_models.state import replaced, variables
from dovetail_protocols import LowRankArray
from dovetail_runtime import EXPERT, mesh, use

SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 0], [4, 4, 4, 4, 4, 4, 4, 4]], np.int32)
REAL = (SEGMENTS != 0).reshape(-1)
X = np.random.default_rng(1).standard_normal((16, 6)).astype(np.float32)


def mixer(**options: Any) -> DenseMixer:
    segments = jnp.asarray(SEGMENTS)
    return DenseMixer.of(segments, segments, **options)


def run(model: SparseMLP, how: DenseMixer) -> Any:
    return jax.jit(lambda model, x, how: model(0, x, how)[:2])(model, jnp.asarray(X), how)


def trained(**options: Any) -> SparseMLP:
    return sparse(Selection(experts=4, top_k=2, training=SparseTraining(**options)))


def by_hand(model: SparseMLP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, scores and choices of the real tokens, in float64."""
    logits = X[REAL].astype(np.float64) @ np.asarray(model.router.weight.get_value(), np.float64)
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return logits, scores, np.argsort(-scores, axis=1)[:, :2]


def test_losses_of_all_tokens() -> None:
    """A coefficient is tuned for the scale of its paper; padding must not count."""
    model = trained(z_coef=0.25, switch_coef=3.0)
    _, aux = run(model, mixer())
    logits, scores, chosen = by_hand(model)
    z, tokens = aux["loss/router_z"]
    np.testing.assert_allclose(z / tokens, 0.25 * np.mean(np.log(np.exp(logits).sum(1)) ** 2), rtol=1e-5)
    shares = np.bincount(chosen.reshape(-1), minlength=4) / chosen.size
    switch, tokens = aux["loss/switch_per_micro_batch"]
    assert float(tokens) == REAL.sum()
    np.testing.assert_allclose(switch / tokens, 3 * 4 * (shares * scores.mean(0)).sum(), rtol=1e-5)
    assert set(aux) == {"loss/router_z", "loss/switch_per_micro_batch"}


def test_statistics() -> None:
    """They are looked at when experts die; they must be those of the tokens."""
    model = trained(statistics=True)
    _, aux = run(model, mixer())
    _, scores, chosen = by_hand(model)
    counts = np.bincount(chosen.reshape(-1), minlength=4)
    means = {name: float(total / weight) for name, (total, weight) in aux.items()}
    np.testing.assert_allclose(means.pop("router/entropy"), -np.mean((scores * np.log(scores)).sum(1)), rtol=1e-5)
    np.testing.assert_allclose(means.pop("router/load_max_per_micro_batch"), counts.max() / counts.mean(), rtol=1e-5)
    np.testing.assert_allclose(means.pop("router/unused_per_micro_batch"), (counts == 0).mean(), atol=1e-6)
    assert not means


def test_capacity_drops_the_last_choices() -> None:
    """Padding must take no room, and what is dropped adds nothing but is told."""
    model, free = trained(capacity=0.75), trained()
    y, aux = run(model, mixer())
    room = int(np.ceil(0.75 * 2 * len(X) / 4))
    routing = free.router.choose(free.router.logits(jnp.asarray(X)))
    experts, taken = np.asarray(routing.experts), np.zeros(4, int)
    weights = np.array(routing.weights)
    for t in range(len(X)):
        for k, e in enumerate(experts[t]):
            if not REAL[t] or taken[e] >= room:
                weights[t, k] = 0
            else:
                taken[e] += 1
    lost, choices = aux["router/dropped_per_micro_batch"]
    assert float(choices) == 2 * REAL.sum()
    assert float(lost) == (weights[REAL] == 0).sum() > 0
    each = [np.asarray(free.experts.batched(jnp.broadcast_to(x, (4, 1, 6))))[:, 0] for x in jnp.asarray(X)]
    expected = [(weights[t][:, None] * each[t][experts[t]]).sum(0) for t in range(len(X))]
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_who_serves_drops_and_counts_nothing() -> None:
    """A reply depends on what else is in the batch."""

    class Serving:
        """A mixer without sums of sequences."""

        def totals(self, values: Any) -> Any:
            return values[:0]

        def choose(self, layer: Any, experts: Any) -> Any:
            del layer
            return experts, self

    model = trained(capacity=0.25, z_coef=1.0, statistics=True)
    y, aux, _ = model(0, jnp.asarray(X), Serving())
    np.testing.assert_allclose(y[REAL], run(trained(), mixer())[0][REAL], atol=1e-5)
    assert all(float(weight) == 0 for name, (_, weight) in aux.items() if not name.endswith("batch"))
    assert "router/dropped_per_micro_batch" not in aux
    np.testing.assert_array_equal(real_tokens(mixer(), 16), REAL)


def test_coefficients_are_of_the_mean_over_layers(build: Any) -> None:
    """A paper's coefficient for the sum over layers has another meaning."""
    kind, config = MODELS["mixtral"]
    found: list[float] = []
    for layers in (1, 3):
        training = SparseTraining(switch_coef=1.0)
        model = kind(dataclasses.replace(config, layers=layers, init_std=1e-6, training=training), rngs=nnx.Rngs(0))
        tokens = jnp.arange(8, dtype=jnp.int32)
        _, aux, _ = model.hidden(tokens, tokens, DenseMixer.of(tokens[None]))
        total, weight = aux["loss/switch_per_micro_batch"]
        found.append(float(total / weight))
    np.testing.assert_allclose(found, 1.0, rtol=1e-3)


def test_room_for_all_is_no_capacity() -> None:
    """With room for everything it is the same layer."""
    np.testing.assert_allclose(
        run(trained(capacity=4.0), mixer())[0][REAL], run(trained(), mixer())[0][REAL], atol=1e-5
    )


def test_the_correction_follows_the_surplus() -> None:
    """Experts with more tokens than the mean get less, the others more, whatever the micro-batches; no loss changes."""
    config = dataclasses.replace(MODELS["deepseek_v3"][1], ahead=0, training=SparseTraining(correct=True))
    model = DeepseekV3(config, rngs=nnx.Rngs(0))
    definition, params = split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (4, 8)), jnp.int32)

    def pulled(params: Any, tokens: jax.Array) -> Any:
        model, places = merge(definition, params), jnp.tile(jnp.arange(8, dtype=jnp.int32), len(tokens))
        return model.hidden(tokens.reshape(-1), places, DenseMixer.of(tokens))[1]["loss/correction"]

    both = jax.jit(jax.grad(lambda params, tokens: pulled(params, tokens)[0]))
    whole, parts = both(params, tokens), [both(params, part) for part in jnp.split(tokens, 2)]
    found = whole["layers"][1]["mlp"]["router"]["correction"]
    np.testing.assert_array_equal(found, sum(part["layers"][1]["mlp"]["router"]["correction"] for part in parts))
    assert float(pulled(params, tokens)[0]) == 0
    rest = jax.tree.map(lambda g: float(jnp.abs(g).max()), whole)
    rest["layers"][1]["mlp"]["router"].pop("correction")
    assert not any(jax.tree.leaves(rest))
    assert float(jnp.abs(found).max()) > 0
    assert abs(float(found.sum())) < 1e-4
    updates, _ = optax.sign_sgd(0.5).update(found, optax.sign_sgd(0.5).init(found))
    np.testing.assert_array_equal(updates, -0.5 * np.sign(found))
    with pytest.raises(ValueError, match="correct=True, but these routers have no correction"):
        Router(6, Selection(experts=4, top_k=2, training=config.training), rngs=nnx.Rngs(0), **WEIGHTS)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("scan", [False, True])
def test_earlier_choices_are_trained(scan: bool) -> None:
    """Each layer's own, in a loop over layers too; with its own choices a model does what it does without."""
    config = MixtralConfig(vocab_size=24, features=8, hidden=12, layers=3, heads=4, kv_heads=2, experts=4, init_std=0.5)
    model = Mixtral(config, rngs=nnx.Rngs(0), scan=scan)
    tokens, places = jnp.arange(10, dtype=jnp.int32)[None], jnp.arange(10, dtype=jnp.int32)

    kept: list[Any] = []

    class Noting(DenseMixer):
        """Keeps what routers choose."""

        per_layer = True

        def choose(self, layer: Any, experts: Any) -> Any:
            assert layer == len(kept)
            kept.append(experts)
            return experts, self

    plain, _, _ = model.hidden(tokens[0], places, Noting.of(tokens))
    own = jnp.stack(kept)
    assert own.shape == (3, 10, 2)
    again = jax.jit(lambda choices: model.hidden(tokens[0], places, DenseMixer.of(tokens, choices=choices))[0])
    np.testing.assert_allclose(again(own), plain, atol=1e-5)
    np.testing.assert_allclose(again(jnp.full_like(own, -1)), plain, atol=1e-5)
    for layer in range(3):
        assert not np.allclose(again(own.at[layer].set((own[layer] + 1) % 4)), plain, atol=1e-3)
    with pytest.raises(ValueError, match=r"choices have shape \(3, 9, 2\); expected \[layers, 10, k\]"):
        DenseMixer.of(tokens, choices=own[:, :9])
    for count in (1, 4):
        with pytest.raises(ValueError, match=f"choices of {count} layers; the model has 3"):
            again(jnp.zeros((count, 10, 2), jnp.int32))


def test_heads_that_look_ahead_choose_for_themselves() -> None:
    """A sampler tells the experts of the model's layers; those of the last one are not meant for a head."""
    config = MODELS["deepseek_v3"][1]
    model = DeepseekV3(config, rngs=nnx.Rngs(0))
    tokens, places = jnp.arange(10, dtype=jnp.int32)[None], jnp.arange(10, dtype=jnp.int32)
    given = DenseMixer.of(tokens, choices=jnp.zeros((config.layers, 10, config.top_k), jnp.int32))
    hidden = jax.random.normal(jax.random.key(0), (10, config.features))
    free, forced = (
        jax.jit(model.look_ahead)(hidden, tokens[0], places, how)[0] for how in (DenseMixer.of(tokens), given)
    )
    np.testing.assert_allclose(forced, free, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "training"),
    [
        ({"fsdp": 2, "expert": 4}, SparseTraining(exchange="ring")),
        ({"fsdp": 2, "expert": 4}, SparseTraining(capacity=1.0)),
        ({"expert": 2, "tensor": 2, "data": 2}, SparseTraining()),
    ],
    ids=["ring", "capacity", "with tensor"],
)
def test_experts_on_devices(sizes: Any, training: SparseTraining, objective: Any) -> None:
    """Loss and gradients are those of one device, for rows that the devices do not divide, too."""
    config = MixtralConfig(
        vocab_size=24, features=8, hidden=12, layers=1, heads=4, kv_heads=2, experts=4, init_std=0.5, training=training
    )
    build = lambda: Mixtral(config, rngs=nnx.Rngs(0))  # noqa: E731
    definition, params = split(build())
    tokens = np.random.default_rng(0).integers(0, 24, (3, 9)).astype(np.int32)
    expected = jax.jit(jax.value_and_grad(objective(definition)))(params, tokens)
    grid = mesh(**sizes)
    placed = jax.device_put(params, placements_of(nnx.eval_shape(build), grid, EXPERT))
    with use(grid, EXPERT):
        got = jax.jit(jax.value_and_grad(objective(definition)))(placed, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


@pytest.mark.parametrize("magnitude", [False, True])
def test_an_adapter_across_experts_on_devices(magnitude: bool, objective: Any) -> None:
    """A rank that is the number of experts is no axis of them, and a magnitude is that of all experts together."""
    config = MixtralConfig(vocab_size=24, features=8, hidden=12, layers=1, heads=4, kv_heads=2, experts=4, init_std=0.5)
    plain, rng = Mixtral(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    address = "layers/0/mlp/experts/up"
    base = variables(plain)[address].get_value()
    a, b, m = (jnp.asarray(rng.uniform(0.1, 0.6, shape), jnp.float32) for shape in ((4, 8, 4), (4, 12), (12,)))
    model = replaced(plain, {address: LowRankArray.checked(base, a, b, m if magnitude else None)})
    definition, params = split(model)
    tokens = rng.integers(0, 24, (3, 9)).astype(np.int32)
    expected = jax.jit(jax.value_and_grad(objective(definition)))(params, tokens)
    grid = mesh(fsdp=2, expert=4)
    with use(grid, EXPERT):
        placed = jax.device_put(params, placements_of(model, grid, EXPERT))
        got = jax.jit(jax.value_and_grad(objective(definition)))(placed, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z_coef": -1.0}, "z_coef=-1.0; expected a number of at least 0"),
        ({"switch_coef": float("nan")}, "switch_coef=nan"),
        ({"capacity": 0.0}, "capacity=0.0; expected a number above 0, or None"),
        ({"exchange": "post"}, "exchange='post'; expected 'all_to_all' or 'ring'"),
        ({"exchange": "ring", "capacity": 1.0}, "exchange='ring' with capacity=1.0; expected one of them"),
    ],
)
def test_bad_options(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTraining(**given)
