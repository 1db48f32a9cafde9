"""dovetail_optim against torch: AdamW with decay groups, learning-rate factors, clipping and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dovetail_optim import GroupOptions, adamw, cosine, linear

SHAPES = {"embedding": (16, 8), "kernel": (8, 12), "bias": (12,), "norm": (8,)}
STEPS = 5
EMBEDDING = {"embedding": GroupOptions(0.1, weight_decay=False)}


def values(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def ours(optimizer):
    params = jax.tree.map(jnp.asarray, values(0))
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for i in range(STEPS):
        updates, state = step(values(i + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


def torchs(make_groups, rate, clip=None, schedule=None, **options):
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values(0).items()}
    optimizer = torch.optim.AdamW(make_groups(params), lr=rate, **options)
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for i in range(STEPS):
        for name, grad in values(i + 1).items():
            params[name].grad = torch.tensor(grad)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {name: param.detach().numpy() for name, param in params.items()}


def matrices(params, decay=0.1):
    """The usual two groups: matrices decay, vectors do not."""
    decayed = [p for p in params.values() if p.ndim >= 2]
    return [
        {"params": decayed, "weight_decay": decay},
        {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0.0},
    ]


def slow_embedding(params):
    rest = {name: p for name, p in params.items() if name != "embedding"}
    return [{"params": [params["embedding"]], "lr": 1e-3, "weight_decay": 0.0}, *matrices(rest)]


def everything(params):
    return list(params.values())


CASES = {
    "decay of matrices": (adamw(1e-2), {"make_groups": matrices, "betas": (0.9, 0.95)}),
    "hyperparameters": (
        adamw(1e-2, b1=0.8, b2=0.999, eps=1e-4, weight_decay=0.3, decay="**"),
        {"make_groups": everything, "betas": (0.8, 0.999), "eps": 1e-4, "weight_decay": 0.3},
    ),
    "a group of its own": (adamw(1e-2, groups=EMBEDDING), {"make_groups": slow_embedding, "betas": (0.9, 0.95)}),
    "clipping": (adamw(1e-2, clip_norm=0.5), {"make_groups": matrices, "betas": (0.9, 0.95), "clip": 0.5}),
    "cosine": (
        adamw(cosine(1e-2, 8, warmup=2)),
        {
            "make_groups": matrices,
            "betas": (0.9, 0.95),
            "schedule": lambda t: t / 2 if t < 2 else 0.5 * (1 + np.cos(np.pi * (t - 2) / 6)),
        },
    ),
    "linear": (
        adamw(linear(1e-2, 8)),
        {"make_groups": matrices, "betas": (0.9, 0.95), "schedule": lambda t: 1 - t / 8},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_five_steps_of_adamw_equal_torch(case):
    """Parameter groups, clipping and schedules have torch's meaning, so that recipes carry over."""
    optimizer, settings = CASES[case]
    expected = torchs(rate=1e-2, **settings)
    found = ours(optimizer)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, atol=2e-6, err_msg=name)
