"""Rotary embeddings against rotation matrices and against Hugging Face's vectors (golden/rope.npz)."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeTable,
    YarnScaling,
    rope,
    rope_axes,
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


def test_interleaved_is_the_half_layout_of_other_features() -> None:
    """Checkpoints in the layout of GPT-J: pairs are neighbours."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 8)), jnp.float32)
    table = rope_table(jnp.arange(5, dtype=jnp.int32), rope_frequencies(8, 100.0)[0])
    order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
    got = rope(x, table, interleaved=True)
    np.testing.assert_allclose(got[..., order], rope(x[..., order], table), atol=1e-6)


def test_partial() -> None:
    """Features behind the rotated ones pass through; with frequencies of 0 too, but their pairs lie further apart."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 8)), jnp.float32)
    positions = jnp.arange(5, dtype=jnp.int32)
    table = rope_table(positions, rope_frequencies(4, 100.0)[0])
    for interleaved in (False, True):
        got = rope(x, table, rotated=4, interleaved=interleaved)
        np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
        np.testing.assert_allclose(got[..., :4], rope(x[..., :4], table, interleaved=interleaved), atol=1e-6)
    frequencies, _ = rope_frequencies(8, 100.0, rotated=4)
    np.testing.assert_allclose(frequencies, [1.0, 100.0**-0.25, 0, 0], rtol=1e-6)
    still = rope(x, rope_table(positions, frequencies))
    np.testing.assert_array_equal(still[..., [2, 3, 6, 7]], x[..., [2, 3, 6, 7]])


def test_several_axes() -> None:
    """Each frequency reads its axis of the position; text, where all axes agree, is as with one."""
    frequencies, _ = rope_frequencies(16, 100.0)
    positions = np.random.default_rng(0).integers(0, 50, (6, 3)).astype(np.int32)
    for sections, interleaved in (([2, 3, 3], False), ([4, 2, 2], True)):
        axes = rope_axes(sections, interleaved=interleaved)
        assert np.bincount(axes).tolist() == sections
        table = rope_table(jnp.asarray(positions), frequencies, axes=axes)
        angles = positions[:, axes] * frequencies.astype(np.float64)
        np.testing.assert_allclose(table.cos, np.cos(angles), atol=1e-5)
        text = rope_table(jnp.asarray(positions[:, :1].repeat(3, 1)), frequencies, axes=axes)
        np.testing.assert_array_equal(text.sin, rope_table(jnp.asarray(positions[:, 0]), frequencies).sin)
    assert rope_axes([3, 3, 2], interleaved=True).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_scalings_that_depend_on_the_length() -> None:
    """Within the original length nothing is stretched; above it the formulas of both papers hold."""
    plain, _ = rope_frequencies(8, 10000.0)
    dynamic = DynamicScaling(2.0, 100)
    np.testing.assert_array_equal(rope_frequencies(8, 10000.0, dynamic, length=100)[0], plain)
    theta = 10000.0 * (2.0 * 3 - 1) ** (8 / 6)
    np.testing.assert_allclose(
        rope_frequencies(8, 10000.0, dynamic, length=300)[0], rope_frequencies(8, theta)[0], rtol=1e-6
    )
    long = LongRopeScaling((1.0, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0, 8.0), 100, factor=4.0)
    short, factor = rope_frequencies(8, 10000.0, long)
    np.testing.assert_allclose(short, plain / [1, 1, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(factor, np.sqrt(1 + np.log(4) / np.log(100)))
    assert rope_frequencies(2, 100.0, LongRopeScaling((1.0,), (2.0,), 1))[1] == 1.0
    np.testing.assert_allclose(rope_frequencies(8, 10000.0, long, length=101)[0], plain / [1, 2, 4, 8], rtol=1e-6)


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
        (lambda: rope_frequencies(8, 100.0, rotated=3), "rotated=3"),
        (lambda: DynamicScaling(0.0, 10), "factor"),
        (lambda: LongRopeScaling((1.0,), (1.0, 2.0), 10), "as many short as long"),
        (lambda: rope_frequencies(8, 100.0, LongRopeScaling((1.0,), (2.0,), 10)), "1 factors.*4 frequencies"),
        (lambda: LongRopeScaling((1.0,), (2.0,), 1, factor=2.0), "original_max_position above 1, or an attention_"),
        (lambda: rope_axes([]), "sections"),
        (lambda: rope_axes([1, 4, 4], interleaved=True), r"turns makes them \[3, 3, 3\], expected larger ones first"),
        (lambda: rope_table(jnp.zeros((3, 2), jnp.int32), [1.0], axes=[2]), r"axes \[2\]"),
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
    """A table of other tokens must not be broadcast, and integers must not round it to zeros."""
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
    with pytest.raises(TypeError, match="x has dtype int32; expected a float"):
        rope(jnp.ones((3, 2, 8), jnp.int32), table)


def test_warmth_of_yarn() -> None:
    """The factor of cosines and sines, and of all logits, as DeepSeek's checkpoints ask for them."""
    log = np.log(40.0)
    plain, both = YarnScaling(40.0, 4096), YarnScaling(40.0, 4096, mscale=0.7, mscale_all_dim=0.9)
    np.testing.assert_allclose([plain.warmth, plain.logit_factor], [0.1 * log + 1, 1.0])
    np.testing.assert_allclose(
        [both.warmth, both.logit_factor], [(0.07 * log + 1) / (0.09 * log + 1), (0.09 * log + 1) ** 2]
    )
    one = YarnScaling(40.0, 4096, mscale_all_dim=1.0)
    np.testing.assert_allclose([one.warmth, one.logit_factor], [0.1 * log + 1, (0.1 * log + 1) ** 2])
    assert YarnScaling(40.0, 4096, attention_factor=1.3, mscale=0.7, mscale_all_dim=0.9).warmth == 1.3
    assert YarnScaling(0.5, 4096, mscale_all_dim=1.0).logit_factor == 1.0
    with pytest.raises(ValueError, match="expected mscale to be a number of at least 0"):
        YarnScaling(40.0, 4096, mscale=-1.0)
