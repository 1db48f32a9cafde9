"""If these fail, a wider model is another one at the beginning, or its copies never differ."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import FEW, MODELS, by_default
from surgery_toys import TOKENS, drawn, flat, made, same

from dovetail_models import from_pretrained, merge, save_pretrained, split, widen


def grown(name: str, **options: Any) -> Any:
    kind, config = MODELS[name]
    changes = {"ahead": 0} if hasattr(config, "ahead") else {}
    return drawn(kind(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("name", by_default(MODELS, FEW))
def test_logits_stay(name: str, logits: Any) -> None:
    """Of every family of decoders, with all widths and copies that differ."""
    model = grown(name)
    factors = {"features": 2} if name == "mamba2" else {"features": 2, "hidden": 3, "heads": 2}
    wide = widen(model, **factors, noise=0.3, seed=1)
    assert wide.config.features == 2 * model.config.features
    before = np.asarray(logits(model, TOKENS))
    np.testing.assert_allclose(logits(wide, TOKENS), before, atol=2e-5 * abs(before).max())


@pytest.mark.parametrize("factors", [{"features": 3}, {"hidden": 2}, {"heads": 2}])
def test_one_width_alone(factors: dict[str, int], logits: Any) -> None:
    """Heads keep their size, the other widths theirs."""
    model = grown("qwen3")
    wide = widen(model, **factors)
    expected = {name: getattr(model.config, name) * factors.get(name, 1) for name in ("features", "hidden", "heads")}
    assert {name: getattr(wide.config, name) for name in expected} == expected
    assert wide.config.dim == model.config.dim
    np.testing.assert_allclose(logits(wide, TOKENS), logits(model, TOKENS), atol=1e-5)


def test_weights_are_copies_by_their_number() -> None:
    """As HyperCloning says, block by block."""
    model = grown("mistral")
    old, new = flat(model), flat(widen(model, features=2, hidden=3, heads=2))
    np.testing.assert_array_equal(new["embedding"], np.tile(old["embedding"], (1, 2)))
    np.testing.assert_array_equal(new["norm/weight"], np.tile(old["norm/weight"], 2))
    np.testing.assert_allclose(new["layers/0/mlp/up"], np.tile(old["layers/0/mlp/up"], (2, 3)) / 2, rtol=1e-6)
    np.testing.assert_allclose(new["layers/0/mlp/down"], np.tile(old["layers/0/mlp/down"], (3, 2)) / 3, rtol=1e-6)
    np.testing.assert_allclose(
        new["layers/1/attention/out"], np.tile(old["layers/1/attention/out"], (2, 1, 2)) / 2, rtol=1e-6
    )
    np.testing.assert_allclose(new["head"], np.tile(old["head"], (2, 1)) / 2, rtol=1e-6)


def test_noise_tells_copies_apart(logits: Any) -> None:
    """By at most its size; without it the gradients of copies are alike, so that they would never part."""
    model = grown("mistral")
    plain, noisy = widen(model, features=2), widen(model, features=2, noise=0.3, seed=4)
    ratio = flat(noisy)["layers/0/mlp/up"] / flat(plain)["layers/0/mlp/up"] - 1
    assert 0.25 < abs(ratio).max() <= 0.3 + 1e-4
    np.testing.assert_allclose(ratio[:8] + ratio[8:], 0, atol=1e-5)
    assert abs(ratio[:8, :5] - ratio[:8, 5:10]).max() > 0.1
    for wide, alike in ((plain, True), (noisy, False)):
        definition, params = split(wide)
        grads = jax.grad(lambda params, d=definition: jnp.sum(logits(merge(d, params), TOKENS) ** 2))(params)
        down = grads["layers"][0]["mlp"]["down"]
        assert np.allclose(down[:, :8], down[:, 8:], rtol=1e-3, atol=1e-4) is alike
    same(noisy, widen(model, features=2, noise=0.3, seed=4))
    assert (flat(noisy)["head"] != flat(widen(model, features=2, noise=0.3, seed=5))["head"]).any()


def test_a_directory_in_parts(tmp_path: Path) -> None:
    """Noise is the same whether a tensor is read whole or in the parts that other names need."""
    for name in ("phi3", "mixtral"):
        model = grown(name)
        wide = widen(save_pretrained(model, tmp_path / f"{name} a"), features=2, hidden=2, heads=2, noise=0.2)
        same(from_pretrained(wide.save(tmp_path / f"{name} b")), widen(model, features=2, hidden=2, heads=2, noise=0.2))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("mistral", {"features": 0}, ValueError, "features=0, hidden=1, heads=1"),
        ("mistral", {"noise": 1.0}, ValueError, "noise=1.0"),
        ("mistral", {"noise": -0.1}, ValueError, "noise=-0.1"),
        ("mamba2", {"hidden": 2}, ValueError, "{'hidden': 2}: a Mamba2Config has nothing"),
        ("mamba2", {"heads": 2}, ValueError, "heads=2: the groups of Mamba2Config"),
        ("gpt2", {"features": 2}, ValueError, "Gpt2Config cannot describe"),
        ("gpt2", {"heads": 2}, ValueError, "Gpt2Config cannot describe"),
        ("glm4_moe", {"features": 2}, ValueError, "ahead=1; heads that look further ahead"),
        ("bert", {"features": 2}, TypeError, "BertConfig: not the configuration of a decoder"),
    ],
)
def test_what_cannot_grow(name: str, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        widen(made(name), **options)


def test_factors_are_integers(untyped: None) -> None:
    with pytest.raises(TypeError, match="integer"):
        widen(made("mistral"), features=1.5)  # pyright: ignore[reportArgumentType]
