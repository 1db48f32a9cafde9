import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_optim import cosine, inverse_sqrt, linear, wsd

SHAPES = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def truth(step, peak, total, warmup, decay, shape, floor):
    """The closed form in float64, written a second time."""
    if step < warmup:
        return peak * step / warmup
    if decay == 0 or step <= total - decay:
        return peak
    x = min(1.0, (step - (total - decay)) / decay)
    return floor + (peak - floor) * SHAPES[shape](x)


@st.composite
def cases(draw):
    total = draw(st.integers(1, 100_000))
    warmup = draw(st.integers(0, total))
    decay = draw(st.integers(0, total - warmup))
    peak = draw(st.floats(1e-6, 10))
    return peak, total, warmup, decay, draw(st.sampled_from(sorted(SHAPES))), draw(st.floats(0, peak))


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 150_000))
def test_wsd_is_its_closed_form_everywhere(case, step):
    peak, total, warmup, decay, shape, floor = case
    schedule = wsd(peak, total, warmup=warmup, decay=decay, shape=shape, floor=floor)
    steps = [step, 0, max(0, warmup - 1), warmup, total - decay, total - 1, total, total + 1, 10 * total]
    expected = [truth(s, *case) for s in steps]
    np.testing.assert_allclose([float(schedule(s)) for s in steps], expected, rtol=2e-6, atol=1e-6 * peak)
    if decay:
        assert float(schedule(total)) == pytest.approx(floor, rel=1e-6, abs=1e-7 * peak)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_cosine_and_linear_equal_optax_where_it_has_them(warmup, floor):
    steps = [0, 1, warmup, 11, 57, 99, 100, 101, 1000]
    optax_cosine = optax.warmup_cosine_decay_schedule(0.0 if warmup else 0.3, 0.3, warmup, 100, floor)
    down = optax.linear_schedule(0.3, floor, 100 - warmup)
    optax_linear = optax.join_schedules([optax.linear_schedule(0.0, 0.3, max(1, warmup)), down], [warmup])
    ours = cosine(0.3, 100, warmup=warmup, floor=floor), linear(0.3, 100, warmup=warmup, floor=floor)
    for mine, theirs in zip(ours, (optax_cosine, optax_linear), strict=True):
        np.testing.assert_allclose([mine(s) for s in steps], [theirs(s) for s in steps], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("warmup", "timescale"), [(0, None), (100, None), (100, 400), (7, 1)])
def test_inverse_sqrt_is_its_closed_form(warmup, timescale):
    schedule = inverse_sqrt(0.5, warmup=warmup, timescale=timescale)
    scale = timescale or max(1, warmup)
    for step in (0, 1, warmup, warmup + 1, 1000, 10**6):
        late = 0.5 / math.sqrt(1 + (step - warmup) / scale) if step >= warmup else 0.5 * step / warmup
        assert float(schedule(step)) == pytest.approx(late, rel=1e-6)


ALL = [
    wsd(1e-3, 100, warmup=10, decay=20),
    cosine(1e-3, 100, warmup=10),
    linear(1e-3, 100, warmup=10),
    inverse_sqrt(1e-3, warmup=10),
]


@pytest.mark.parametrize("schedule", ALL, ids=["wsd", "cosine", "linear", "inverse_sqrt"])
def test_a_traced_step_gives_the_same_float32(schedule):
    """Inside a jitted step the rate must be what the log prints, and strict dtype promotion must hold."""
    steps = jnp.arange(0, 130, dtype=jnp.int32)
    vector = jax.jit(schedule)(steps)
    assert vector.dtype == jnp.float32
    assert vector.shape == steps.shape
    for step in (0, 9, 10, 11, 80, 85, 99, 100, 129):
        for form in (step, np.int64(step), jnp.int32(step)):
            out = schedule(form)
            assert (out.dtype, out.shape) == (jnp.float32, ())
            np.testing.assert_allclose(out, vector[step], rtol=1e-6, atol=1e-10)
    assert bool((vector >= 0).all())


@pytest.mark.parametrize("schedule", ALL, ids=["wsd", "cosine", "linear", "inverse_sqrt"])
def test_they_are_optax_schedules(schedule):
    tx = optax.sgd(schedule)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for step in range(12):
        updates, state = tx.update({"w": jnp.ones(3)}, state, params)
        np.testing.assert_allclose(updates["w"], -float(schedule(step)), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wsd(1.0, 10, warmup=6, decay=5), r"warmup=6 \+ decay=5 exceed total_steps=10"),
        (lambda: wsd(1.0, 10, warmup=1, decay=1, shape="sqrt"), r"shape='sqrt'.*1-sqrt"),
        (lambda: wsd(0.0, 10, warmup=1, decay=1), r"peak=0\.0"),
        (lambda: wsd(float("nan"), 10, warmup=1, decay=1), "peak=nan"),
        (lambda: wsd(1.0, 10, warmup=1, decay=1, floor=2.0), r"floor=2\.0"),
        (lambda: wsd(1.0, 10, warmup=1, decay=1, floor=-0.1), r"floor=-0\.1"),
        (lambda: wsd(1.0, 0, warmup=0, decay=0), "total_steps=0"),
        (lambda: wsd(1.0, 10, warmup=-1, decay=0), "warmup=-1"),
        (lambda: wsd(1.0, 10, warmup=0.1, decay=0), r"warmup=0\.1.*whole number"),
        (lambda: wsd(1.0, 10, warmup=1, decay=True), "decay=True"),
        (lambda: cosine(1.0, 10, warmup=10), "warmup=10 leaves nothing"),
        (lambda: linear(1.0, 10, warmup=11), "warmup=11 leaves nothing"),
        (lambda: linear(-1.0, 10), r"peak=-1\.0"),
        (lambda: inverse_sqrt(1.0, warmup=-1), "warmup=-1"),
        (lambda: inverse_sqrt(1.0, warmup=1, timescale=0), "timescale=0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    """A schedule that silently never reaches its end wastes the run."""
    with pytest.raises(ValueError, match=message):
        make()
