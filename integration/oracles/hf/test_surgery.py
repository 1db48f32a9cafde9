"""Surgery from directory to directory, seen by transformers alone: it opens what was written, and computes the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, load_theirs, random_config, widened

from dovetail_models import lazy, merge_models, prune_layers, repeat_layers, resize_vocabulary, widen

TIME = 23


def logits(model: torch.nn.Module, vocab_size: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, vocab_size, (2, TIME))
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint that transformers wrote."""
    config = random_config(5, request.param)
    if request.param == "gpt2":
        config.scale_attn_by_inverse_layer_idx = False  # copies would be scaled by their own place
    widened(config, 5).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_what_should_compute_the_same(source: Path, tmp_path: Path) -> None:
    """Copies that add nothing, wider layers, a larger vocabulary."""
    size = lazy(source).config.vocab_size
    expected = logits(load_theirs(source), size)
    scale = abs(expected).max()
    twice = [layer for layer in range(lazy(source).config.layers) for _ in "ab"]
    repeat_layers(source, twice, zero=True).save(tmp_path / "deep")
    np.testing.assert_allclose(logits(load_theirs(tmp_path / "deep"), size), expected, atol=1e-5 * scale)
    recurrent = hasattr(lazy(source).config, "state_size")
    factors = {"features": 2} if recurrent else {"features": 2, "hidden": 2, "heads": 2}
    if (
        not recurrent
        or lazy(source).config.heads * lazy(source).config.head_dim % (2 * lazy(source).config.features) == 0
    ):
        widen(source, **factors, noise=0.2).save(tmp_path / "wide")
        np.testing.assert_allclose(logits(load_theirs(tmp_path / "wide"), size), expected, atol=1e-4 * scale)
    resize_vocabulary(source, size + 5).save(tmp_path / "more")
    np.testing.assert_allclose(logits(load_theirs(tmp_path / "more"), size)[..., :size], expected, atol=1e-5 * scale)


def test_what_transformers_can_do_itself(source: Path, tmp_path: Path) -> None:
    """The mean as the first weights of new tokens, averages of parameters, and a last layer that is gone."""
    size, layers = lazy(source).config.vocab_size, lazy(source).config.layers
    theirs = load_theirs(source)
    theirs.resize_token_embeddings(size + 5, mean_resizing=True)  # draws around the mean, by 1e-9 of the covariance
    resize_vocabulary(source, size + 5).save(tmp_path / "more")
    np.testing.assert_allclose(logits(load_theirs(tmp_path / "more"), size), logits(theirs, size), atol=5e-3)

    widened(load_theirs(source).config, 6).save_pretrained(tmp_path / "other")
    first, second = (load_theirs(folder) for folder in (source, tmp_path / "other"))
    merge_models([source, tmp_path / "other"], weights=[0.25, 0.75]).save(tmp_path / "merged")
    other = second.state_dict()
    first.load_state_dict({name: 0.25 * x + 0.75 * other[name] for name, x in first.state_dict().items()})
    np.testing.assert_allclose(logits(load_theirs(tmp_path / "merged"), size), logits(first, size), atol=1e-4)

    if layers > 1:
        prune_layers(source, [layers - 1]).save(tmp_path / "shallow")
        theirs = load_theirs(source)
        body = getattr(theirs, "model", None) or getattr(theirs, "transformer", None) or theirs.backbone
        kept = body.h if hasattr(body, "h") else body.layers
        del kept[layers - 1]
        theirs.config.num_hidden_layers = layers - 1
        np.testing.assert_allclose(logits(load_theirs(tmp_path / "shallow"), size), logits(theirs, size), atol=1e-4)
