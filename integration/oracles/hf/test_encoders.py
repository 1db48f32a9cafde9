"""Random encoders against transformers: hidden states, logits, all gradients, our export read back there."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from encoders import ENCODERS, inputs_of, named_arrays, ours_outputs, random_encoder, their_outputs
from families import in_memory

from dovetail_models import from_pretrained, merge, save_pretrained, split, weight_map
from dovetail_weights import open_directory, save


def load_theirs(architecture: str, folder: Path, **options: Any) -> Any:
    kind = getattr(transformers, architecture)
    return in_memory(kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("architecture", ENCODERS)
def test_random_encoders(architecture: str, seed: int, tmp_path: Path) -> None:
    """A checkpoint computes and trains here as it does there, and goes back unchanged."""
    random_encoder(architecture, seed).save_pretrained(tmp_path / "theirs")
    theirs = load_theirs(architecture, tmp_path / "theirs")
    model = from_pretrained(tmp_path / "theirs")
    inputs = inputs_of(theirs.config, seed)
    rng = np.random.default_rng(seed)

    outputs = their_outputs(theirs, inputs)
    weights = [rng.normal(size=out.shape).astype(np.float32) for out in outputs]
    sum((out * torch.from_numpy(w)).sum() for out, w in zip(outputs, weights, strict=True)).backward()

    definition, params = split(model)
    arrays = {name: jnp.asarray(x, jnp.float32 if name == "pixels" else jnp.int32) for name, x in inputs.items()}

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            got = ours_outputs(merge(definition, params), arrays)
            return sum(jnp.sum(out * w) for out, w in zip(got, weights, strict=True)), got

        return jax.grad(loss, has_aux=True)(params)

    gradients, got = run(params)
    for ours, their in zip(got, outputs, strict=True):
        np.testing.assert_allclose(ours, their.detach().numpy(), atol=1e-4, rtol=1e-5)

    save(tmp_path / "gradients", weight_map(model.config), gradients)
    found = open_directory(tmp_path / "gradients")
    expected = named_arrays(theirs, tmp_path / "expected", lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    assert set(found) == set(expected)
    largest = max(np.abs(expected.read(name)).max() for name in expected)
    for name in expected:
        gradient = expected.read(name)
        scale = max(np.abs(gradient).max(), 1e-2 * largest)
        np.testing.assert_allclose(found.read(name) / scale, gradient / scale, atol=1e-4, err_msg=name)

    save_pretrained(model, tmp_path / "ours", max_shard_bytes=20_000)
    again = load_theirs(architecture, tmp_path / "ours")
    with torch.no_grad():
        found, expected = their_outputs(again, inputs), their_outputs(theirs, inputs)
        if "'gelu_new'" in str(theirs.config.to_dict()):
            # It is written as gelu_pytorch_tanh, the same function, which they compute with other last digits.
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            found = their_outputs(load_theirs(architecture, tmp_path / "ours", config=theirs.config), inputs)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
