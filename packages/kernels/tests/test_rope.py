"""Rotary embeddings against rotation matrices and against Hugging Face's vectors (golden/rope.npz)."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeTable,
    YarnScaling,
    rope,
    rope_frequencies,
    rope_table,
)

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden/rope.npz")
CASES: list[dict[str, Any]] = json.loads(str(GOLDEN["cases"]))


def scaling_of(case: dict[str, Any]) -> RopeScaling | None:
    names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "attention_factor", "truncate")
    options = {name: case[name] for name in names if name in case}
    if "original_max_position_embeddings" in case:
        options["original_max_position"] = case["original_max_position_embeddings"]
    kinds = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
    return None if case["rope_type"] == "default" else kinds[case["rope_type"]](**options)


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i]['rope_type']}")
def test_hugging_face(i: int) -> None:
    """Checkpoints trained elsewhere read positions wrongly if a scaling differs."""
    case = CASES[i]
    frequencies, factor = rope_frequencies(case["dim"], case["theta"], scaling_of(case))
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, GOLDEN[f"{i}/frequencies"], rtol=1e-6)
    np.testing.assert_allclose(factor, GOLDEN[f"{i}/factor"], rtol=1e-9)
    positions = GOLDEN["positions"]
    got = rope(jnp.asarray(GOLDEN[f"{i}/x"]), rope_table(jnp.asarray(positions), frequencies, factor=factor))
    error = np.abs(got - GOLDEN[f"{i}/rotated"]).max(axis=(1, 2))
    assert (error < 1e-5 + positions * 1e-6).all()  # angles of far positions amplify the last bit of a frequency


def test_rotation_matrices() -> None:
    """The half layout: features i and i + dim/2 turn by position * frequency, as a float64 matrix does it."""
    dim, heads = 6, 2
    positions = np.array([[0, 3], [11, 250]], np.int32)
    x = np.random.default_rng(0).standard_normal((2, 2, heads, dim))
    frequencies, _ = rope_frequencies(dim, 100.0)
    expected = np.zeros_like(x)
    for at in np.ndindex(positions.shape):
        matrix = np.zeros((dim, dim))
        for i in range(dim // 2):
            angle = positions[at] * 100.0 ** (-2 * i / dim)
            matrix[i, i] = matrix[i + 3, i + 3] = np.cos(angle)
            matrix[i, i + 3], matrix[i + 3, i] = -np.sin(angle), np.sin(angle)
        expected[at] = x[at] @ matrix.T
    got = rope(jnp.asarray(x, jnp.float32), rope_table(jnp.asarray(positions), frequencies))
    np.testing.assert_allclose(got, expected, atol=5e-5)


def test_products_depend_on_distance_only() -> None:
    """The property that makes the encoding relative."""
    frequencies, _ = rope_frequencies(8, 10000.0)
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(np.broadcast_to(rng.standard_normal(8), (20, 1, 8)), jnp.float32) for _ in range(2))
    table = rope_table(jnp.arange(20, dtype=jnp.int32), frequencies)
    scores = np.asarray(jnp.einsum("tc,sc->ts", rope(q, table)[:, 0], rope(k, table)[:, 0]))
    for distance in range(-19, 20):
        np.testing.assert_allclose(np.diagonal(scores, distance), scores.diagonal(distance)[0], atol=1e-4)


def test_bfloat16_keeps_its_dtype() -> None:
    """Activations stay in 16 bits although the table is float32."""
    frequencies, _ = rope_frequencies(8, 10000.0)
    table = rope_table(jnp.arange(3, dtype=jnp.int32), frequencies)
    assert rope(jnp.ones((3, 1, 8), jnp.bfloat16), table).dtype == jnp.bfloat16
    assert rope_table(jnp.arange(3, dtype=jnp.int32), frequencies, dtype=jnp.bfloat16).cos.dtype == jnp.bfloat16


def test_scalings_with_factor_one_change_nothing() -> None:
    """A scaling's blends meet at the plain frequencies."""
    plain, _ = rope_frequencies(32, 10000.0)
    for scaling in (LinearScaling(1.0), Llama3Scaling(1.0, 1.0, 4.0, 128), YarnScaling(1.0, 128)):
        frequencies, factor = rope_frequencies(32, 10000.0, scaling)
        np.testing.assert_allclose(frequencies, plain, rtol=1e-6)
        assert factor == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rope_frequencies(7, 10000.0), "dim=7"),
        (lambda: rope_frequencies(0, 10000.0), "dim=0"),
        (lambda: rope_frequencies(8, 1.0), "theta=1.0"),
        (lambda: rope_frequencies(8, float("nan")), "theta=nan"),
        (lambda: LinearScaling(0.0), "factor=0.0.*positive"),
        (lambda: LinearScaling(float("inf")), "positive"),
        (lambda: Llama3Scaling(8.0, 4.0, 4.0, 8192), "high_freq_factor above low_freq_factor"),
        (lambda: Llama3Scaling(8.0, 1.0, 4.0, 0), "original_max_position"),
        (lambda: YarnScaling(-1.0, 4096), "factor"),
        (lambda: YarnScaling(2.0, 4096, beta_fast=1.0, beta_slow=32.0), "beta_fast above beta_slow"),
        (lambda: YarnScaling(2.0, 4096, attention_factor=0.0), "attention_factor"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    """A setting that would give NaN or zero frequencies is refused when it is made."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("untyped")
def test_bad_arrays() -> None:
    """A table of other tokens must not be broadcast."""
    frequencies, _ = rope_frequencies(8, 10000.0)
    table = rope_table(jnp.arange(3, dtype=jnp.int32), frequencies)
    with pytest.raises(ValueError, match=r"\(3, 4\); x \(4, 2, 8\) needs \(4, 4\)"):
        rope(jnp.ones((4, 2, 8)), table)
    with pytest.raises(ValueError, match=r"x \(3, 2, 6\) needs \(3, 3\)"):
        rope(jnp.ones((3, 2, 6)), table)
    with pytest.raises(ValueError, match="even dim"):
        rope(jnp.ones((3, 2, 9)), RopeTable(*table))
    with pytest.raises(ValueError, match="even dim"):
        rope(jnp.ones(8), table)
    with pytest.raises(TypeError, match="float32; expected integers"):
        rope_table(jnp.ones(3), frequencies)
