"""Random configurations of every family against transformers: logits, all gradients, our export read back there."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families import EAGER, FAMILIES, load_theirs, random_config, widened
from flax import nnx
from transformers.modeling_layers import MtpModel

from dovetail_kernels import DenseMixer, LinearScaling, Llama3Scaling, YarnScaling, linear_cross_entropy
from dovetail_models import Llama, LlamaConfig, from_pretrained, merge, save_pretrained, split, weight_map
from dovetail_weights import open_directory, save, write_directory

BATCH, TIME = 2, 37
WAVERING = {"qwen3_next"}
"""Families of which two models with the same parameters differ in last digits there."""


def ours(model: Llama, tokens: np.ndarray, targets: np.ndarray) -> tuple[jax.Array, jax.Array, Any]:
    definition, params = split(model)

    @jax.jit
    def run(params: Any, tokens: jax.Array, targets: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            model = merge(definition, params)
            positions = jnp.tile(jnp.arange(TIME, dtype=jnp.int32), BATCH)
            hidden, _, _ = model.hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
            weight, bias, cap = model.unembedding()
            total = linear_cross_entropy(hidden, weight, targets.reshape(-1), bias=bias, softcap=cap)
            return total, model.unembed(hidden).reshape(BATCH, TIME, -1)

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, value, gradients

    return run(params, jnp.asarray(tokens, jnp.int32), jnp.asarray(targets, jnp.int32))


def batch(seed: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab_size, (BATCH, TIME)), rng.integers(0, vocab_size, (BATCH, TIME))


def stored_gradients(model: transformers.PreTrainedModel, folder: Path) -> dict[str, np.ndarray]:
    """Return all gradients under the names of a checkpoint, in which experts stand one by one; spoils the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
        for buffer in model.buffers():
            buffer.zero_()
    model.save_pretrained(folder)
    tensors = open_directory(folder)
    return {name: tensors.read(name) for name in tensors}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_configurations(family: str, seed: int, tmp_path: Path) -> None:
    """A checkpoint computes and trains here as it does there, and goes back unchanged."""
    theirs = widened(random_config(seed, family), seed)
    theirs.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "theirs")
    tokens, targets = batch(seed, model.vocab_size)

    logits = theirs(torch.from_numpy(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="sum")
    loss.backward()
    got, value, gradients = ours(model, tokens, targets)
    np.testing.assert_allclose(got, logits.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)

    save(tmp_path / "gradients", weight_map(model.config), gradients)
    found = open_directory(tmp_path / "gradients")
    expected = stored_gradients(theirs, tmp_path / "theirs' gradients")
    assert set(found) == set(expected)
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(np.abs(gradient).max(), 1e-2 * largest)  # some are 0 but for rounding, as that of a bias of keys
        np.testing.assert_allclose(found.read(name) / scale, gradient / scale, atol=1e-4, err_msg=name)

    save_pretrained(model, tmp_path / "ours", token_ids={"eos_token_id": 2}, max_shard_bytes=20_000)
    again = load_theirs(tmp_path / "ours")
    with torch.no_grad():
        found = again(torch.from_numpy(tokens)).logits
    if family in WAVERING:
        stored = load_theirs(tmp_path / "theirs").state_dict()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in again.state_dict().items())
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-6)
    else:
        assert torch.equal(found, logits)


@pytest.mark.parametrize(
    "scaling",
    [None, LinearScaling(2.0), Llama3Scaling(4.0, 1.0, 4.0, 32), YarnScaling(4.0, 32, attention_factor=1.1)],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_our_models_load_there(scaling: Any, dtype: Any, tmp_path: Path) -> None:
    """What we train opens with transformers, with our logits, configuration and end tokens."""
    config = LlamaConfig(
        vocab_size=50, features=24, hidden=36, layers=2, heads=4, kv_heads=2, head_dim=10, init_std=0.3,
        rope_theta=5000.0, rope_scaling=scaling, max_position=128, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = Llama(config, rngs=nnx.Rngs(1), param_dtype=dtype, dtype=jnp.float32)
    save_pretrained(model, tmp_path / "out", token_ids={"eos_token_id": [1, 4], "bos_token_id": 3})
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert stored.dtype == {jnp.float32: torch.float32, jnp.bfloat16: torch.bfloat16}[dtype]
    assert stored.generation_config.eos_token_id == [1, 4]
    assert stored.generation_config.bos_token_id == 3
    theirs = load_theirs(tmp_path / "out")
    tokens, targets = batch(0, 50)
    got, _, _ = ours(model, tokens, targets)
    with torch.no_grad():
        np.testing.assert_allclose(got, theirs(torch.from_numpy(tokens)).logits.numpy(), atol=1e-4)


def test_factors_of_long_sequences(tmp_path: Path) -> None:
    """Beyond the original length transformers takes other factors; so does a model that is made for it."""
    config = random_config(2, "phi3")
    rope = {"rope_type": "longrope", "rope_theta": 1000.0, "short_factor": [1.0] * 2, "long_factor": [3.0, 5.0]}
    lengths = {"original_max_position_embeddings": TIME - 1, "max_position_embeddings": 256}
    config = type(config)(**config.to_dict() | {"rope_parameters": {**rope, "partial_rotary_factor": 0.5}} | lengths)
    theirs = widened(config, 2)
    theirs.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    tokens, targets = batch(2, model.vocab_size)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(model.for_length(TIME), tokens, targets)[0], expected, atol=1e-4)
    assert np.abs(ours(model, tokens, targets)[0] - expected).max() > 1e-2


def test_balancing_loss_of_one_sequence(tmp_path: Path) -> None:
    """Where only one sequence and one layer count, ours is theirs, coefficient included."""
    config = random_config(6, "mixtral")
    config.output_router_logits, config.router_aux_loss_coef = True, 0.1
    theirs = widened(config, 6)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, TIME))
    with torch.no_grad():
        expected = 0.1 * theirs(torch.from_numpy(tokens)).aux_loss.item()
    positions = jnp.arange(TIME, dtype=jnp.int32)
    _, aux, _ = from_pretrained(tmp_path).hidden(
        jnp.asarray(tokens[0], jnp.int32), positions, DenseMixer.of(jnp.asarray(tokens, jnp.int32))
    )
    total, weight = aux["loss/balance"]
    np.testing.assert_allclose(total / weight, expected, rtol=1e-5)


def with_heads(family: str, seed: int, heads: int, folder: Path) -> tuple[Any, Any]:
    """Store a model with heads that look ahead; return it and its heads, as transformers builds them.

    A head's block is a layer, and is stored as one after the last: so it is made as one of a deeper model.
    """
    config = random_config(seed, family)
    layers, config.first_k_dense_replace = config.num_hidden_layers, 0
    config.num_hidden_layers += heads
    deep = widened(config, seed)
    deep.save_pretrained(folder / "deep")
    config.num_hidden_layers, config.num_nextn_predict_layers = layers, heads
    main = transformers.AutoModelForCausalLM.from_config(config, **EAGER).float().eval()
    main.load_state_dict(deep.state_dict(), strict=False)
    ahead = MtpModel(main, heads).float().eval()
    stored = open_directory(folder / "deep")
    tensors = {name: stored.read(name) for name in stored}
    for i, head in enumerate(ahead.layers):
        head.mtp_block.load_state_dict(deep.model.layers[layers + i].state_dict())
        named = {"enorm": head.enorm, "hnorm": head.hnorm, "eh_proj": head.eh_proj, "shared_head.norm": head.post_norm}
        for name, module in named.items():
            torch.nn.init.uniform_(module.weight, -0.3 if name == "eh_proj" else 0.5, 0.8)
            tensors[f"model.layers.{layers + i}.{name}.weight"] = module.weight.detach().numpy()
    config.architectures = [type(main).__name__]
    write_directory(folder / "all", tensors, extra_files={"config.json": config.to_json_string(use_diff=False)})
    return main, ahead


@pytest.mark.parametrize(("seed", "heads"), [(1, 1), (7, 2)])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_heads_that_look_ahead(family: str, seed: int, heads: int, tmp_path: Path) -> None:
    """The states of prediction heads are others than there, or a checkpoint loses them."""
    main, ahead = with_heads(family, seed, heads, tmp_path)
    model = from_pretrained(tmp_path / "all")
    tokens, targets = batch(seed, model.vocab_size)
    positions, mixer = jnp.tile(jnp.arange(TIME, dtype=jnp.int32), BATCH), DenseMixer.of(jnp.asarray(tokens, jnp.int32))
    hidden, _, _ = model.hidden(jnp.asarray(tokens.reshape(-1), jnp.int32), positions, mixer)
    with torch.no_grad():
        state, places = main.model(torch.from_numpy(tokens)).last_hidden_state, torch.arange(TIME).repeat(BATCH, 1)
        for i in range(heads):
            following = np.roll(targets, -i, 1)
            flat = jnp.asarray(following.reshape(-1), jnp.int32)
            hidden, _, _ = model.look_ahead(hidden, flat, positions, mixer, head=i)
            state = ahead.forward_layer(i, state, places, None, input_ids=torch.from_numpy(following))
            np.testing.assert_allclose(hidden.reshape(state.shape), state.numpy(), atol=1e-4)
    before, after = open_directory(tmp_path / "all"), open_directory(save_pretrained(model, tmp_path / "again"))
    assert set(before) == set(after)
    assert all(np.array_equal(before.read(name), after.read(name)) for name in before)
    with torch.no_grad():
        again = load_theirs(tmp_path / "again")(torch.from_numpy(tokens)).logits
        assert torch.equal(again, main(torch.from_numpy(tokens)).logits)
