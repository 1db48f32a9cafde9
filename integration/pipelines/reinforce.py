"""A model learns from a reward alone: trainer and engine share one set of parameters, nothing is copied.

    python integration/pipelines/reinforce.py --steps 60 --seed 0 --out DIR

The task can be verified: a prompt is a run of digits such as ``7 8``, and the reply has to count on, ``9 0 1 2 ...``.
The reward is the fraction of its digits that follow from the one before.

Each step lends the trainer's parameters to the engine, samples a group of replies per prompt, and takes one step of
REINFORCE (Williams, 1992) on them; the baseline of a reply is the mean reward of the others in its group (RLOO:
Kool et al., 2019; Ahmadian et al., 2024, arXiv:2402.14740). The step donates the parameters it starts from: the engine
refuses to run until `update_params` hands over the new ones, so no reply is sampled from old parameters.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dovetail_models as models
import dovetail_optim as optim
import dovetail_train as train
from dovetail_engine import Engine, EngineOptions
from dovetail_kernels import DenseMixer, token_logprobs
from dovetail_protocols import Completion, LossOutput, Request, SamplingParams, Sink, Term

DIGITS = 10  # the vocabulary
PROMPTS, GROUP = 8, 8  # prompts per step, replies per prompt
PROMPT, REPLY = 3, 8  # tokens of a prompt, at most, and of a reply


class Batch(NamedTuple):
    """Replies and what they were worth; the trainer takes any pytree whose leaves share the leading axis.

    Attributes:
        tokens: int32 ``[rows, time + 1]``, prompt and reply, then padding.
        sampled: float32 ``[rows, time]``, 1 where the next token is of the reply.
        logprobs: float32 ``[rows, time]``, what the engine says of that token.
        rewards: float32 ``[rows]``.
        advantages: float32 ``[rows]``, rewards less their baselines.
    """

    tokens: Any
    sampled: Any
    logprobs: Any
    rewards: Any
    advantages: Any


def reward(prompt: Sequence[int], reply: Sequence[int]) -> float:
    """Return the fraction of digits that are one more, modulo ten, than the digit before."""
    return sum((a + 1) % DIGITS == b for a, b in itertools.pairwise([prompt[-1], *reply])) / len(reply)


def requests(seed: int, step: int) -> list[Request]:
    """Return the requests of a step, each with its own seed: the replies are a function of the parameters alone."""
    random = np.random.default_rng([seed, step])
    starts, lengths = random.integers(DIGITS, size=PROMPTS), random.integers(1, PROMPT + 1, PROMPTS)
    prompts = [[(start + i) % DIGITS for i in range(length)] for start, length in zip(starts, lengths, strict=True)]
    seeds = random.integers(2**31, size=(PROMPTS, GROUP)).tolist()
    how = SamplingParams(max_tokens=REPLY, temperature=1.0, logprobs=0)
    return [
        Request(prompt=prompt, sampling=dataclasses.replace(how, seed=own))
        for prompt, group in zip(prompts, seeds, strict=True)
        for own in group
    ]


def sample(engine: Engine, asked: Sequence[Request]) -> list[Completion]:
    """Return the replies; the idle engine batches the same requests alike in every run, bit for bit."""
    replies = engine.generate(asked)
    if failed := [reply.error for reply in replies if reply.error]:
        raise RuntimeError(f"{len(failed)} of {len(replies)} replies failed, the first with: {failed[0]}")
    return replies


def batch(asked: Sequence[Request], replies: Sequence[Completion]) -> Batch:
    """Score replies and lay them out in rows."""
    rows, time = len(asked), PROMPT + REPLY - 1
    tokens, rewards = np.zeros((rows, time + 1), np.int32), np.zeros(rows, np.float32)
    sampled, logprobs = np.zeros((2, rows, time), np.float32)
    for row, (request, reply) in enumerate(zip(asked, replies, strict=True)):
        start, end = len(request.prompt), len(request.prompt) + len(reply.token_ids)
        tokens[row, :end] = *request.prompt, *reply.token_ids
        sampled[row, start - 1 : end - 1] = 1
        logprobs[row, start - 1 : end - 1] = [entry.value for entry in reply.logprobs or ()]
        rewards[row] = reward(request.prompt, reply.token_ids)
    groups = rewards.reshape(-1, GROUP)
    others = (groups.sum(1, keepdims=True) - groups) / (GROUP - 1)
    return Batch(tokens, sampled, logprobs, rewards, (groups - others).reshape(-1))


def log_likelihood(definition: Any, params: Any, tokens: Any) -> jax.Array:
    """Return the log-probability ``[rows, time]`` of every token but the first of a row, by the plain forward."""
    model = models.merge(definition, params)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    hidden, _, _ = model.hidden(inputs.reshape(-1), positions.reshape(-1), DenseMixer.of(inputs))
    weight, bias, softcap = model.unembedding()
    found = token_logprobs(hidden, weight, targets.reshape(-1), bias=bias, softcap=softcap)
    return found.reshape(targets.shape)


def policy_gradient(definition: Any) -> Callable[[Any, Batch], LossOutput]:
    """Return the loss whose gradient is that of REINFORCE: per reply, minus its log-probability times its advantage.

    The parameters are those that sampled, so every importance ratio is 1: ``mismatch``, the mean distance between the
    log-probabilities of trainer and engine, is rounding.
    """

    def loss(params: Any, batch: Batch) -> LossOutput:
        values = log_likelihood(definition, params, batch.tokens) * batch.sampled
        rows, count = jnp.float32(len(batch.tokens)), jnp.sum(batch.sampled)
        aux = {
            "reward": Term(jnp.sum(batch.rewards), rows),
            "entropy": Term(-jnp.sum(values), count),
            "mismatch": Term(jnp.sum(jnp.abs(values - batch.logprobs)), count),
        }
        return LossOutput(-jnp.sum(values * batch.advantages[:, None]), rows, aux)

    return loss


def make(seed: int) -> tuple[Any, train.Trainer, Engine]:
    """Return the definition of a small random Llama, and a trainer and an engine that share its parameters."""
    config = models.LlamaConfig(vocab_size=DIGITS, features=32, hidden=64, layers=1, heads=4, kv_heads=2)
    definition, params = models.split(models.Llama(config, rngs=nnx.Rngs(seed)))
    trainer = train.Trainer(params, policy_gradient(definition), optim.adamw(1e-2, weight_decay=0.0))
    options = EngineOptions(max_running=16, max_length=PROMPT + REPLY, chunk_tokens=16)
    return definition, trainer, Engine(functools.partial(models.merge, definition), trainer.params, options=options)


def learn(trainer: train.Trainer, engine: Engine, steps: int, *, seed: int, sinks: Sequence[Sink] = ()) -> list[float]:
    """Take steps, each on replies to its own prompts; return the mean reward of every step."""
    curve: list[float] = []
    for step in range(1, steps + 1):
        engine.update_params(trainer.params, version=step, copy=False)
        asked = requests(seed, step)
        metrics = trainer.step(batch(asked, sample(engine, asked)))  # the engine's parameters are gone now
        values = {name: float(value) for name, value in metrics.items()}
        curve.append(values["reward"])
        for sink in sinks:
            sink.metrics(step, values)
        if step % 10 == 0:
            print(f"step {step}:", *(f"{name} {value:.3g}" for name, value in values.items()), flush=True)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new directory for metrics.jsonl")
    options = parser.parse_args()
    _, trainer, engine = make(options.seed)
    with engine, train.JsonLines(options.out) if options.out else contextlib.nullcontext() as lines:
        learn(trainer, engine, options.steps, seed=options.seed, sinks=[lines] if lines else [])


if __name__ == "__main__":
    main()
