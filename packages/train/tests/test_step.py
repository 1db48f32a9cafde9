"""The step: gradients are those of the whole batch, however it is split."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from train_toys import FarLM, SparseLM, batch_of, quadratic, regression, tiny

from dovetail_kernels import DenseMixer, linear_cross_entropy
from dovetail_protocols import paths
from dovetail_protocols.testing import FakeQuantized
from dovetail_runtime import DATA, mesh
from dovetail_train import Trainer, init_state, make_step, next_token

KEEP_GRADIENT = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g))


def gradients(loss, params, batch, accumulate, key=None):
    state = init_state(params, KEEP_GRADIENT, key)
    state, metrics = jax.jit(make_step(loss, KEEP_GRADIENT, accumulate=accumulate))(state, batch)
    return state.opt_state, {k: float(v) for k, v in metrics.items()}


def test_gradient_is_the_closed_form_of_both_terms():
    """Breaks when a term is divided by anything but its own weight, or a reported-only term enters the objective."""
    batch, params = regression()
    b = {k: np.asarray(v, np.float64) for k, v in batch.items()}
    w = np.asarray(params["w"], np.float64)
    error = b["x"] @ w - b["y"]
    main = 2 * b["x"].T @ (b["m"] * error) / b["m"].sum()
    size = 2 * b["x"].T @ (b["v"] * (b["x"] @ w)) / b["v"].sum()
    got, metrics = gradients(quadratic, params, batch, 1)
    np.testing.assert_allclose(got["w"], main + size, rtol=1e-5)
    assert metrics["loss"] == pytest.approx((b["m"] * error**2).sum() / b["m"].sum(), rel=1e-5)
    assert metrics["bias"] == pytest.approx(error.mean(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(main + size), rel=1e-5)


@pytest.mark.parametrize("count", [2, 3, 4, 12])
def test_accumulation_is_exact_with_unequal_masks_and_auxiliary_loss(count):
    """Breaks when micro-batches are averaged instead of added (the classic accumulation error)."""
    batch, params = regression()
    whole, one = gradients(quadratic, params, batch, 1)
    parts, many = gradients(quadratic, params, batch, count)
    np.testing.assert_allclose(parts["w"], whole["w"], atol=1e-6, rtol=1e-6)
    assert many == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("count", [2, 8])
def test_language_model_accumulation_is_exact(count):
    """The same for a language model on packed rows with masked targets and an auxiliary loss of its own weight."""
    definition, params = tiny()
    loss = next_token(definition, auxiliary={"size": 0.01})
    whole, one = gradients(loss, params, batch_of(0), 1)
    parts, many = gradients(loss, params, batch_of(0), count)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert many == pytest.approx(one, rel=1e-5)


def test_sharded_batch_accumulates_to_the_same_gradient():
    """Breaks when micro-batches of a data-parallel batch lose or repeat rows."""
    batch, params = regression(rows=16)
    whole, _ = gradients(quadratic, params, batch, 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    parts, _ = gradients(quadratic, params, sharded, 2)
    np.testing.assert_allclose(parts["w"], whole["w"], atol=1e-6, rtol=1e-6)


def test_a_batch_without_targets_has_zero_gradient():
    """Breaks as NaN when 0 / 0 reaches the parameters."""
    batch, params = regression()
    batch = batch | {"m": np.zeros(12, np.float32), "v": np.zeros(12, np.float32)}
    got, _ = gradients(quadratic, params, batch, 3)
    np.testing.assert_array_equal(got["w"], np.zeros(3))


def test_keys_depend_on_step_and_micro_batch_alone():
    """Breaks when noise repeats between micro-batches or steps, or differs when a run is repeated."""
    batch, params = regression()

    def noisy(p, b, key):
        out = quadratic(p, b)
        noise = jax.random.normal(key, ())
        return out._replace(sum=out.sum + noise * jnp.sum(p["w"]) * out.weight)

    def twice():
        state = init_state(params, optax.sgd(0.0), jax.random.key(1))
        step = jax.jit(make_step(noisy, optax.sgd(0.0), accumulate=2))
        norms = []
        for _ in range(2):
            state, metrics = step(state, batch)
            norms.append(float(metrics["grad_norm"]))
        return norms

    first = twice()
    assert first == twice()
    assert first[0] != first[1]


@pytest.mark.parametrize(("accumulate", "match"), [(0, "at least 1"), (5, "does not divide the 12 rows")])
def test_bad_accumulation_is_refused(accumulate, match):
    batch, params = regression()
    with pytest.raises(ValueError, match=match):
        gradients(quadratic, params, batch, accumulate)


def states(params, batch, row):
    """The hidden states of a row in float64."""
    x = np.asarray(params["embedding"], np.float64)[batch.tokens[row]]
    heads = x.reshape(len(x), 2, -1).transpose(1, 0, 2)
    seg = batch.segment_ids[row]
    keep = (seg[:, None] == seg[None]) & (seg[:, None] != 0) & np.tri(len(x), dtype=bool)
    logits = np.where(keep, heads @ heads.transpose(0, 2, 1) * 0.5, -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p = np.nan_to_num(p / p.sum(-1, keepdims=True))
    return x + (p @ heads).transpose(1, 0, 2).reshape(x.shape)


def nll(params, hidden, target):
    z = hidden @ np.asarray(params["head"], np.float64)
    return np.log(np.exp(z).sum()) - z[target]


def test_next_token_equals_float64_cross_entropy():
    """Breaks when masks, targets or segments are read wrongly."""
    definition, params = tiny()
    batch = batch_of(3)
    output = next_token(definition)(params, batch)
    total = 0.0
    for row, (targets, weights) in enumerate(zip(batch.targets, batch.loss_weights, strict=True)):
        hidden = states(params, batch, row)
        total += sum(w * nll(params, h, target) for h, target, w in zip(hidden, targets, weights, strict=True))
    assert float(output.sum) == pytest.approx(total, rel=1e-5)
    assert float(output.weight) == batch.loss_weights.sum()


def test_heads_that_look_ahead_equal_float64_cross_entropy():
    """Breaks when a head is asked for a token of another document, or for the one before or after its own."""
    definition, params = tiny(model=FarLM)
    batch = batch_of(3)
    output = next_token(definition, ahead=(0.5, 0.25))(params, batch)
    e = np.asarray(params["embedding"], np.float64)
    rows, time = batch.tokens.shape
    for head, factor in enumerate((0.5, 0.25)):
        total = weight = 0.0
        for row in range(rows):
            hidden = states(params, batch, row)
            for t in range(time - head - 1):
                last = t + head + 1  # predicts the target there
                if batch.segment_ids[row, t] != batch.segment_ids[row, last]:
                    continue
                state = hidden[t] + sum((i + 1) * e[batch.targets[row, t + i]] for i in range(head + 1))
                total += batch.loss_weights[row, last] * nll(params, state, batch.targets[row, last])
                weight += batch.loss_weights[row, last]
        term = output.aux[f"loss/ahead_{head}"]
        assert float(term.sum) == pytest.approx(factor * total, rel=1e-5)
        assert float(term.weight) == weight > 0
    plain = next_token(definition)(params, batch)
    assert float(output.sum) == float(plain.sum)
    assert float(output.aux["size"].weight) == float(plain.aux["size"].weight) + 2 * batch.tokens.size


@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_is_exact_with_heads_that_look_ahead(count):
    """Their weights differ from those of the next token."""
    definition, params = tiny(model=FarLM)
    loss = next_token(definition, ahead=(0.5,))
    whole, one = gradients(loss, params, batch_of(0), 1)
    parts, many = gradients(loss, params, batch_of(0), count)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert many == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("time", [1, 2])
def test_rows_too_short_for_a_head(time):
    """Nothing is left to predict; the gradient is that of the next token, not NaN."""
    definition, params = tiny(model=FarLM)
    batch = batch_of(0, time=time)
    _, metrics = gradients(next_token(definition, ahead=(0.0, 0.5, 0.5)), params, batch, 1)
    _, plain = gradients(next_token(definition), params, batch, 1)
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_a_model_without_heads_that_look_ahead():
    definition, params = tiny()
    with pytest.raises(TypeError, match=r"ahead=\(0.5,\), but TinyLM has no look_ahead"):
        next_token(definition, ahead=(0.5,))(params, batch_of(0))


def replayed(seed, shape=(8, 6)):
    """A batch whose tokens chose experts of `SparseLM` before, but for those that choose now."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 4, (*shape, 2))
    choices = np.stack([first, (first + rng.integers(1, 4, first.shape)) % 4], axis=-1).astype(np.int32)
    choices[rng.random(shape) < 0.3] = -1
    return batch_of(seed)._replace(choices=choices)


def test_earlier_choices_of_experts_are_trained():
    """Breaks when a token goes where another did, or another layer's choice is taken."""
    definition, params = tiny(model=SparseLM)
    batch, loss = replayed(0), jax.jit(next_token(definition))
    model = nnx.merge(definition, params)
    choices = jnp.asarray(batch.choices.transpose(2, 0, 1, 3).reshape(2, -1, 2))
    mixer = DenseMixer.of(jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids), choices=choices)
    hidden, _, _ = model.hidden(batch.tokens.reshape(-1), batch.positions.reshape(-1), mixer)
    flat = jnp.asarray(batch.targets.reshape(-1))
    expected = linear_cross_entropy(
        hidden, model.unembedding()[0], flat, loss_weights=jnp.asarray(batch.loss_weights.reshape(-1))
    )
    assert float(loss(params, batch).sum) == pytest.approx(float(expected), rel=1e-6)
    free = float(loss(params, batch._replace(choices=None)).sum)
    assert abs(free - expected) > 0.01
    assert float(loss(params, batch._replace(choices=np.full_like(batch.choices, -1))).sum) == pytest.approx(free)


@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_is_exact_with_earlier_choices(count):
    """Micro-batches take their own rows' choices."""
    definition, params = tiny(model=SparseLM)
    loss = next_token(definition)
    whole, one = gradients(loss, params, replayed(0), 1)
    parts, many = gradients(loss, params, replayed(0), count)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert many == pytest.approx(one, rel=1e-5)


def test_unknown_auxiliary_name_lists_the_known_ones():
    definition, params = tiny()
    with pytest.raises(ValueError, match=r"\['balance'\].*\['size'\]"):
        next_token(definition, auxiliary={"balance": 1.0})(params, batch_of(0))


FEW = ["hea*"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_what_is_chosen_is_trained(accumulate):
    """Breaks when a frozen parameter moves or has a state, or a trained one moves in another way than among all."""
    definition, params = tiny()
    loss, optimizer = next_token(definition), optax.sgd(0.1, momentum=0.9)
    chosen = set(paths.select(params, FEW))
    after = {}
    for name in (FEW, "**"):
        state = init_state(params, optimizer, trained=name)
        step = jax.jit(make_step(loss, optimizer, accumulate=accumulate, trained=name))
        state, metrics = step(state, batch_of(0))
        after[str(name)] = paths.flatten(state.params), len(jax.tree.leaves(state.opt_state)), metrics
    (few, states, metrics), (every, all_states, all_metrics) = after.values()
    assert (states, all_states) == (len(chosen), len(every))
    assert metrics["loss"] == all_metrics["loss"]
    assert 0 < metrics["grad_norm"] < all_metrics["grad_norm"]
    for address, before in paths.flatten(params).items():
        np.testing.assert_array_equal(few[address], every[address] if address in chosen else before)
        assert address not in chosen or not np.array_equal(few[address], before)


def test_a_pattern_of_nothing_is_refused():
    with pytest.raises(paths.PatternError, match="'heads' matches no leaf"):
        init_state(tiny()[1], optax.sgd(0.1), trained="heads")


def test_no_pattern_is_refused():
    """Nothing would be trained, step after step."""
    definition, params = tiny()
    with pytest.raises(ValueError, match=r"trained=\(\) has no patterns; expected at least one"):
        Trainer(params, next_token(definition), optax.sgd(0.1), trained=[])
    with pytest.raises(ValueError, match="has no patterns"):
        make_step(next_token(definition), optax.sgd(0.1), trained=iter(()))
    with pytest.raises(ValueError, match="has no patterns"):
        init_state(params, optax.sgd(0.1), trained=())


def test_patterns_are_read_once():
    """Breaks when an iterator is empty from the second trace on, as for batches of another shape."""
    definition, params = tiny()
    step = jax.jit(make_step(next_token(definition), optax.sgd(0.1), trained=iter(FEW)))
    state = init_state(params, optax.sgd(0.1), trained=iter(FEW))
    for rows in (8, 4):
        before = state.params["head"]
        state, _ = step(state, batch_of(0, rows=rows))
        assert not np.array_equal(state.params["head"], before)
    trainer = Trainer(params, next_token(definition), optax.sgd(0.1), trained=iter(FEW))
    trainer.step(batch_of(0))
    assert not np.array_equal(trainer.params["head"], params["head"])


@pytest.mark.parametrize("trained", ["**", "embedding/**"])
def test_integers_are_not_trained(trained):
    """A quantized base beside adapters; the error names what has no gradient, and what to say instead."""
    definition, params = tiny()
    params = {**params, "embedding": FakeQuantized.of(params, "embedding").quantized["embedding"]}
    with pytest.raises(TypeError, match=r"embedding/qvalue has dtype int8.*trained= patterns without it"):
        Trainer(params, next_token(definition), optax.sgd(0.1), trained=trained)
    state = init_state(params, optax.sgd(0.1), trained="head")
    with pytest.raises(TypeError, match="embedding/qvalue has dtype int8"):
        make_step(next_token(definition), optax.sgd(0.1), trained=trained)(state, batch_of(0))


@pytest.mark.parametrize("places", [{}, {"mesh": mesh(data=-1), "rules": DATA}], ids=["one device", "mesh"])
def test_what_is_frozen_may_be_quantized(places):
    """Breaks when integers are differentiated, or a part of a quantized parameter moves."""
    definition, params = tiny()
    params = {**params, "embedding": FakeQuantized.of(params, "embedding").quantized["embedding"]}
    trainer = Trainer(params, next_token(definition), optax.sgd(0.1), trained=["head"], **places)
    losses = [float(trainer.step(batch_of(0))["loss"]) for _ in range(3)]
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, trainer.params["embedding"], params["embedding"])
    assert not np.array_equal(trainer.params["head"], params["head"])
