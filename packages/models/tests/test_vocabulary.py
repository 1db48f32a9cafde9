"""If these fail, old tokens get other logits, or new ones begin with weights that were not asked for."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, MODELS, by_default
from surgery_toys import TOKENS, encoded, flat, made, replaced, same

from dovetail_models import Gemma3Multimodal, from_pretrained, resize_vocabulary, save_pretrained, split
from dovetail_weights import WeightsError


@pytest.mark.parametrize("name", by_default(MODELS))
def test_old_tokens_keep_their_logits(name: str, logits: Any) -> None:
    """Exactly; new ones have the mean logits of the old ones, since logits are linear in the weights of a token."""
    model = made(name)
    wide = resize_vocabulary(model, 26, multiple_of=4)
    assert wide.config.vocab_size == 28
    before, after = logits(model, TOKENS), logits(wide, TOKENS)
    np.testing.assert_array_equal(after[..., :24], before)
    cap = model.config.logit_softcap
    linear = before if cap is None else cap * np.arctanh(np.asarray(before, np.float64) / cap)
    mean = linear.mean(-1)
    np.testing.assert_allclose(after[..., 25], mean if cap is None else cap * np.tanh(mean / cap), atol=1e-4)
    assert split(resize_vocabulary(wide, 24, shrink=True))[0] == split(model)[0]
    same(resize_vocabulary(wide, 24, shrink=True), model)


@pytest.mark.parametrize("name", ["bert", "masked_lm", "siglip", "siglip text", "t5"])
def test_encoders(name: str) -> None:
    model = made(name)
    wide = resize_vocabulary(model, 13)
    ours = np.asarray(encoded(name, wide))
    np.testing.assert_array_equal(ours[..., :10] if name == "masked_lm" else ours, encoded(name, model))
    if name == "masked_lm":
        np.testing.assert_allclose(ours[..., 12], ours[..., :10].mean(-1), atol=1e-5)


def test_first_values(build: Any) -> None:
    """The mean, the mean of what they are like, or drawn around the mean with the covariance of the old ones."""
    model = build()
    wide = flat(resize_vocabulary(model, 4048, spread=0.5, like={48: [3], 50: [1, 1, 7]}, seed=1))
    old = flat(model)
    for name, axis in (("embedding", 0), ("head", 1)):
        rows, given = (
            np.moveaxis(wide[name], axis, 0).astype(np.float64),
            np.moveaxis(old[name], axis, 0).astype(np.float64),
        )
        np.testing.assert_array_equal(rows[:48], given)
        np.testing.assert_array_equal(rows[48], given[3])
        np.testing.assert_allclose(rows[50], (2 * given[1] + given[7]) / 3, atol=1e-6)
        drawn = rows[51:]
        scale = given.std()
        np.testing.assert_allclose(drawn.mean(0), given.mean(0), atol=0.05 * scale)
        covariance = np.cov(given.T, bias=True)
        np.testing.assert_allclose(np.cov(drawn.T), 0.5 * covariance, atol=0.05 * scale**2)
    again = flat(resize_vocabulary(model, 4048, spread=0.5, like={48: [3], 50: [1, 1, 7]}, seed=1))
    other = flat(resize_vocabulary(model, 4048, spread=0.5, seed=2))
    np.testing.assert_array_equal(again["head"], wide["head"])
    assert (other["head"] != wide["head"]).any()


def test_a_directory_and_its_settings(tmp_path: Path, build: Any) -> None:
    """A checkpoint becomes what the model becomes; what settings name cannot be dropped."""
    model = build(param_dtype=jnp.bfloat16)
    path = save_pretrained(model, tmp_path / "a", token_ids={"eos_token_id": [5, 40], "bos_token_id": 1})
    made = resize_vocabulary(path, 50, multiple_of=8).save(tmp_path / "b")
    assert json.loads((made / "config.json").read_text())["vocab_size"] == 56
    same(from_pretrained(made, param_dtype=jnp.bfloat16), resize_vocabulary(model, 56))
    with pytest.raises(ValueError, match=r"drops tokens .*'eos_token_id': \[5, 40\]"):
        resize_vocabulary(path, 40, shrink=True)
    assert resize_vocabulary(path, 41, shrink=True).config.vocab_size == 41


def test_texts_with_images() -> None:
    from test_multimodal import CONFIG

    model = Gemma3Multimodal(CONFIG, rngs=nnx.Rngs(0))
    old = CONFIG.text.vocab_size
    assert resize_vocabulary(model, old + 3).config.text.vocab_size == old + 3
    with pytest.raises(ValueError, match="_image_id"):
        resize_vocabulary(model, 1, shrink=True)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (0, {}, "size=0, multiple_of=1; expected both at least 1"),
        (50, {"multiple_of": 0}, "multiple_of=0"),
        (40, {}, "size=40, but there are 48 tokens; pass shrink=True to drop the last 8"),
        (50, {"spread": -1.0}, "spread=-1.0"),
        (50, {"spread": float("nan")}, "spread=nan"),
        (50, {"like": {3: [1]}}, r"like: tokens \[3\]; expected new ones, from 48 to 49"),
        (50, {"like": {50: [1]}}, r"like: tokens \[50\]"),
        (50, {"like": {48: []}}, "like: tokens for 48: none"),
        (50, {"like": {48: [48]}}, r"like: tokens for 48: \[48\]; .*from 0 to 47"),
    ],
)
def test_bad_input(size: int, options: Any, message: str, build: Any) -> None:
    with pytest.raises(ValueError, match=message):
        resize_vocabulary(build(), size, **options)


def test_models_without_tokens_and_damaged_ones(build: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ViTConfig has no vocabulary"):
        resize_vocabulary(made("vit"), 12)
    model = build()
    broken = replaced(model, {"head": np.full((16, 48), np.inf, np.float32)})
    with pytest.raises(WeightsError, match="head has values that are not finite"):
        resize_vocabulary(broken, 50)
    path = save_pretrained(broken, tmp_path / "a")
    with pytest.raises(WeightsError, match="head has values"):
        resize_vocabulary(path, 50).save(tmp_path / "b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_every_encoder_with_tokens_was_tried() -> None:
    found = {name for name, (_, config) in ENCODERS.items() if hasattr(getattr(config, "text", config), "vocab_size")}
    assert found == {"bert", "masked_lm", "siglip", "siglip text", "t5"}
