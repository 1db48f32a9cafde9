"""Kits of `Recurrence` and of `Mixer.recur`: sequences cut anywhere, packed and padded give what they give alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols.model import Recurrence, RecurrentCache
from dovetail_protocols.testing._rules import close_to, require
from dovetail_protocols.testing.reference import walk

__all__ = ["check_recur", "check_recurrence"]

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 2, 2, 0, 2, 3, 4, 4, 4]], np.int32)
WIDTH = 3


def check_recurrence(recurrence: Recurrence, inputs: Sequence[Any], *, tolerance: float = 1e-4) -> None:
    """Check the recurrence of a layer.

    Args:
        recurrence: with parameters that matter.
        inputs: random ones in float32, ``[rows, time, ...]`` each, at least 2 rows of 6 tokens; fewest shapes are
            compiled where 3 divides the number of tokens.
        tolerance: of outputs and states, relative to the largest value.

    Raises:
        ConformanceError: a rule is broken.
    """
    run = _Run(recurrence, tuple(jnp.asarray(x) for x in inputs), tolerance)
    _check_form(run)
    _check_steps(run)
    _check_cuts(run)
    _check_segments(run)
    _check_rows(run)


@dataclasses.dataclass
class _Run:
    recurrence: Recurrence
    inputs: tuple[jax.Array, ...]
    tolerance: float

    def __post_init__(self) -> None:
        self.rows, self.time = self.inputs[0].shape[:2]
        self.shapes = dict(self.recurrence.cache_spec().state)
        self.chunk = jax.jit(lambda kernel, state, inputs, ids: kernel.chunk(state, inputs, ids))
        self.steps = jax.jit(walk)

    def state(self, seed: int | None = None) -> dict[str, jax.Array]:
        """Zeros, or random numbers."""
        if seed is None:
            return {name: jnp.zeros((self.rows, *shape), jnp.float32) for name, shape in self.shapes.items()}
        rng = np.random.default_rng(seed)
        draw = {name: rng.standard_normal((self.rows, *shape)) for name, shape in self.shapes.items()}
        return {name: jnp.asarray(value, jnp.float32) for name, value in draw.items()}

    def __call__(self, state: Any, inputs: Any = None, ids: Any = None, *, form: Any = None) -> tuple[Any, Any]:
        """Outputs and states of many tokens."""
        ids = None if ids is None else jnp.asarray(ids)
        return (form or self.chunk)(self.recurrence, state, self.inputs if inputs is None else inputs, ids)

    def part(self, start: int, stop: int) -> tuple[jax.Array, ...]:
        """The inputs of some tokens."""
        return tuple(x[:, start:stop] for x in self.inputs)

    def compare(self, rule: str, got: tuple[Any, Any], expected: tuple[Any, Any], **values: Any) -> None:
        """Compare outputs and states."""
        for what, left, right in (("output", got[0], expected[0]), *_pairs(got[1], expected[1])):
            error = close_to(left, right, self.tolerance)
            require(error is None, rule, of=what, error=error, **values)


def _pairs(got: Mapping[str, Any], expected: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(f"state {name}", got[name], expected[name]) for name in expected]


def _check_form(run: _Run) -> None:
    leaves = jax.tree.leaves(run.recurrence)
    arrays = all(hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves)
    require(arrays, "Recurrence: it is a pytree of arrays", leaves=[type(leaf).__name__ for leaf in leaves])
    for name, call in (("step", lambda: _step(run)), ("chunk", lambda: run(run.state()))):
        out, state = call()
        tokens = (run.rows, run.time) if name == "chunk" else (run.rows,)
        rule = f"Recurrence: {name} gives an output for each token"
        require(out.shape[: len(tokens)] == tokens, rule, shape=out.shape, expected=tokens)
        found = {key: tuple(value.shape[1:]) for key, value in state.items()}
        rule = f"Recurrence: {name} returns the state that cache_spec describes"
        require(found == run.shapes, rule, state=found, expected=run.shapes)


def _step(run: _Run) -> tuple[Any, Any]:
    return run.recurrence.step(run.state(), tuple(x[:, 0] for x in run.inputs))


def _check_steps(run: _Run) -> None:
    whole = np.ones((run.rows, run.time), np.int32)
    for state in (run.state(), run.state(0)):
        expected = run(state, ids=whole, form=run.steps)
        run.compare("Recurrence: chunk does what step does token after token", run(state), expected)
        run.compare("Recurrence: one segment without padding is no segment ids", run(state, ids=whole), expected)


def _check_cuts(run: _Run) -> None:
    whole = run(run.state(0))
    for cut in (run.time // 3, 2 * (run.time // 3)):
        head, between = run(run.state(0), run.part(0, cut))
        tail, after = run({k: v.astype(jnp.float32) for k, v in between.items()}, run.part(cut, run.time))
        joined = jnp.concatenate([head, tail], axis=1), after
        run.compare("Recurrence: a sequence may be cut anywhere", joined, whole, cut=cut)


def _check_segments(run: _Run) -> None:
    third = run.time // 3
    parts = [(0, third), (third, 2 * third), (2 * third, run.time)]
    lengths = [stop - start for start, stop in parts]
    ids = np.tile(np.repeat(np.array([9, 2, 9], np.int32), lengths), (run.rows, 1))
    starts = [run.state(0), run.state(), run.state()]
    alone = [run(state, run.part(*part)) for state, part in zip(starts, parts, strict=True)]
    expected = jnp.concatenate([out for out, _ in alone], axis=1), alone[-1][1]
    run.compare(
        "Recurrence: a segment begins with zeros, the first with the state", run(run.state(0), ids=ids), expected
    )
    _check_padding(run, ids, expected)


def _check_padding(run: _Run, ids: np.ndarray, expected: tuple[Any, Any]) -> None:
    places = [0, run.time // 3 - 1, run.time // 2, run.time]
    padded = np.insert(ids, places, 0, axis=1)
    inputs = tuple(jnp.asarray(np.insert(np.asarray(x), places, np.nan, axis=1)) for x in run.inputs)
    out, state = run(run.state(0), inputs, padded)
    require(np.isfinite(out).all(), "Recurrence: outputs of padding are finite, whatever stands there")
    rule = "Recurrence: padding changes neither outputs of other tokens nor the state"
    run.compare(rule, (np.asarray(out)[:, padded[0] != 0], state), expected)


def _check_rows(run: _Run) -> None:
    whole, state = run(run.state(0)), run.state(0)
    for row in range(run.rows):
        one = {name: value[row : row + 1] for name, value in state.items()}
        out, after = run(one, tuple(x[row : row + 1] for x in run.inputs))
        expected = whole[0][row : row + 1], {name: value[row : row + 1] for name, value in whole[1].items()}
        run.compare("Recurrence: a row gives the same alone and among others", (out, after), expected, row=row)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fading:
    """A sum that fades, ``total = gate * total + x``, and the token before: ``mix * total + shift * before``.

    Attributes:
        mix: ``[features]``.
        shift: ``[features]``.
    """

    mix: Any
    shift: Any

    def cache_spec(self) -> RecurrentCache:
        """See `Recurrence`."""
        return RecurrentCache((("total", self.mix.shape), ("before", (1, *self.mix.shape))))

    def chunk(self, state: Any, inputs: tuple[Any, ...], segment_ids: Any) -> tuple[Any, Any]:
        """See `Recurrence`."""
        ids = jnp.ones(inputs[0].shape[:2], jnp.int32) if segment_ids is None else segment_ids
        return walk(self, state, inputs, ids)

    def step(self, state: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """See `Recurrence`."""
        x, gate = inputs
        total = gate[:, None] * state["total"] + x
        out = self.mix * total + self.shift * state["before"][:, 0]
        return out.astype(x.dtype), {"total": total, "before": x[:, None]}


def _faded(kernel: Fading, x: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """Return the outputs of `Fading` in float64, from the sums as they are written on paper."""
    mix, shift = (np.asarray(part, np.float64) for part in (kernel.mix, kernel.shift))
    out = np.zeros(x.shape)
    for row, place in np.ndindex(*SEGMENTS.shape):
        segment = SEGMENTS[row, place]
        own = [at for at in range(place + 1) if SEGMENTS[row, at] == segment != 0]
        for n, at in enumerate(own):
            out[row, place] += mix * x[row, at] * np.prod(gate[row, own[n + 1 :]])
        if len(own) > 1:
            out[row, place] += shift * x[row, own[-2]]
    return out


def check_recur(make_mixer: Callable[[Any], Any], tolerance: float) -> None:
    """Check `Mixer.recur` of a dense mixer; see `check_mixer`, which calls it. One that does not offer it passes."""
    rng = np.random.default_rng(0)
    kernel = Fading(*(jnp.asarray(rng.standard_normal(WIDTH), jnp.float32) for _ in range(2)))
    x, gate = rng.standard_normal((*SEGMENTS.shape, WIDTH)), rng.uniform(0.5, 1.0, SEGMENTS.shape)
    given = kernel, (jnp.asarray(x.reshape(-1, WIDTH), jnp.float32), jnp.asarray(gate.reshape(-1), jnp.float32))
    weight = jnp.asarray(rng.standard_normal((SEGMENTS.size, WIDTH)), jnp.float32)
    real = SEGMENTS.reshape(-1) != 0
    mixer = make_mixer(jnp.asarray(SEGMENTS))

    def objective(kernel: Fading, inputs: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        out, after = mixer.recur(0, kernel, inputs)
        counted = jnp.where(jnp.asarray(real)[:, None], out.reshape(weight.shape) * weight, 0.0)
        return jnp.sum(counted), (out, after)

    try:
        (_, (out, after)), gradients = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(*given)
    except NotImplementedError:
        return
    expected = _faded(kernel, x, gate).reshape(-1, WIDTH)
    require(out.shape == expected.shape, "Mixer: recur returns [tokens, ...]", shape=out.shape, expected=expected.shape)
    require(np.isfinite(out).all(), "Mixer: the output of recur is finite, padding included")
    error = close_to(np.asarray(out)[real], expected[real], tolerance)
    rule = "Mixer: recur runs each segment of a row from zeros"
    require(error is None, rule, segments=SEGMENTS.tolist(), error=error)
    same = jax.tree.structure(after) == jax.tree.structure(mixer)
    require(same, "Mixer: the mixer after recur is a pytree of the same structure, as a scan needs it")
    _check_slope(lambda *given: objective(*given)[0], given, gradients)


def _check_slope(objective: Callable[..., Any], given: Any, gradients: Any) -> None:
    rng, step = np.random.default_rng(1), 1e-2
    finite = all(np.isfinite(part).all() for part in jax.tree.leaves(gradients))
    require(finite, "Mixer: gradients of recur are finite, padding included")
    way = jax.tree.map(lambda x: jnp.asarray(step * rng.standard_normal(x.shape), jnp.float32), given)
    above, below = (objective(*jax.tree.map(lambda x, d, s=s: x + s * d, given, way)) for s in (1, -1))
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradients, way)), strict=True))
    error = close_to(slope / step, (float(above) - float(below)) / (2 * step), 2e-2)
    rule = "Mixer: gradients of recur, for inputs and for what the recurrence holds, are those of the output"
    require(error is None, rule, error=error)
