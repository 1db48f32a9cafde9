"""Linear attention of dovetail_kernels against transformers' torch functions: values, states and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from dovetail_kernels import causal_conv1d, causal_conv1d_step, gated_delta_rule, gated_delta_step, ssd, ssd_step


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def plain(function):
    """The torch function itself, not a kernel that it may be replaced with."""
    return getattr(function, "__wrapped__", function)


def close(ours, theirs, tolerance=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        expected = b.detach().numpy()
        np.testing.assert_allclose(a, expected, atol=tolerance * max(1.0, np.abs(expected).max()))


def torch_gradients(function, arrays):
    """Results of a function, and the gradients of the sum of their sines."""
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    outs = function(*tensors)
    sum(out.sin().sum() for out in outs).backward()
    return [*outs, *(x.grad for x in tensors)]


def jax_gradients(function, arrays):
    """The same of a function of ours."""
    arrays = [jnp.asarray(x) for x in arrays]
    gradient = jax.grad(lambda *x: sum(jnp.sum(jnp.sin(out)) for out in function(*x)), tuple(range(len(arrays))))
    return [*function(*arrays), *gradient(*arrays)]


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("time", [1, 70, 128])
def test_ssd(time, implementation):
    """A Mamba-2 checkpoint gives other logits if the recurrence, its groups or its state differ."""
    x, dt, a, b, c, d, state = draw(
        (2, time, 4, 8), (2, time, 4), (4,), (2, time, 2, 16), (2, time, 2, 16), (4,), (2, 4, 8, 16)
    )
    arrays = [x, np.log1p(np.exp(dt)), -np.exp(a), b, c, d, state]

    def theirs(x, dt, a, b, c, d, state):
        return plain(mamba2.mamba2_chunk_scan)(
            x, dt, a, b, c, chunk_size=64, D=d, initial_states=state, return_final_states=True
        )

    def ours(x, dt, a, b, c, d, state):
        return ssd(x, dt, a, b, c, d=d, state=state, implementation=implementation)

    close(jax.jit(lambda *x: jax_gradients(ours, x))(*arrays), torch_gradients(theirs, arrays))


def test_ssd_step():
    """Decoding a Mamba-2 checkpoint drifts if a step differs."""
    x, dt, a, b, c, d, state = draw((2, 4, 8), (2, 4), (4,), (2, 2, 16), (2, 2, 16), (4,), (2, 4, 8, 16))
    dt, a = np.log1p(np.exp(dt)), -np.exp(a)
    after = torch.tensor(state)
    rates = torch.tensor(a)[:, None, None].expand(4, 8, 16)
    steps, skip = torch.tensor(dt)[..., None].expand(2, 4, 8), torch.tensor(d)[:, None].expand(4, 8)
    inputs = [torch.tensor(part) for part in (b, c)]
    out = plain(mamba2.mamba2_selective_state_update)(after, torch.tensor(x), steps, rates, *inputs, skip)
    found = ssd_step(*map(jnp.asarray, (x, dt, a, b, c)), d=jnp.asarray(d), state=jnp.asarray(state))
    close(found, [out, after])


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("time", [1, 70, 128])
def test_gated_delta_rule(time, name):
    """A Qwen3-Next checkpoint gives other logits if the rule, its scale or its state differ."""
    q, k, v, g, beta, state = draw(
        (2, time, 2, 8), (2, time, 2, 8), (2, time, 4, 6), (2, time, 4), (2, time, 4), (2, 4, 8, 6)
    )
    arrays = [q, k, v, -np.exp(g), 1 / (1 + np.exp(beta)), state]

    def theirs(q, k, v, g, beta, state):
        return plain(getattr(qwen, name))(
            q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    def ours(q, k, v, g, beta, state):
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
        return gated_delta_rule(q, k, v, g, beta, state=state)

    close(jax.jit(lambda *x: jax_gradients(ours, x))(*arrays), torch_gradients(theirs, arrays))
    if time == 1:
        unit = [x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k)]
        tokens = [jnp.asarray(x[:, 0]) for x in (*unit, *arrays[2:5])]
        out, after = gated_delta_step(*tokens, state=jnp.asarray(state))
        close([out[:, None], after], theirs(*map(torch.tensor, arrays)))


@pytest.mark.parametrize("time", [1, 2, 40])
def test_causal_conv1d(time):
    """The first layer of both reads other tokens if taps are in another order or the activation differs."""
    x, weight, bias = draw((2, time, 6), (6, 4), (6,))

    def theirs(x, weight, bias):
        out = plain(mamba2.causal_conv1d_fn)(x.transpose(1, 2), weight, bias, activation="silu")
        return (out.transpose(1, 2),)

    def ours(x, weight, bias):
        return (causal_conv1d(x, weight, bias, activation="silu")[0],)

    close(jax.jit(lambda *x: jax_gradients(ours, x))(x, weight, bias), torch_gradients(theirs, [x, weight, bias]))


def test_causal_conv1d_step():
    """Decoding reads other tokens if the state is in another order."""
    x, weight, bias, state = draw((2, 6), (6, 4), (6,), (2, 3, 6))
    after = torch.tensor(state).transpose(1, 2).contiguous()
    taps = [torch.tensor(part) for part in (weight, bias)]
    out = plain(mamba2.causal_conv1d_update)(torch.tensor(x)[..., None], after, *taps, "silu")
    arrays = [jnp.asarray(part) for part in (x, weight, bias)]
    found = causal_conv1d_step(*arrays, state=jnp.asarray(state), activation="silu")
    close(found, [out[..., 0], after.transpose(1, 2)])
