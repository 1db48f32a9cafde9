"""The post-training loop: the reward rises, trainer and engine agree, and old parameters are refused."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dovetail_protocols as protocols
import dovetail_train as train
from dovetail_protocols import testing

PIPELINES = Path(__file__).parent.parent / "pipelines"
STEPS, SEED = 24, 3


@pytest.fixture(scope="module")
def pipeline():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PIPELINES)
        yield importlib.import_module("reinforce")


@pytest.fixture(scope="module")
def run(pipeline, tmp_path_factory):
    """Run the pipeline once; return its parts, open, and what it learned and wrote."""
    definition, trainer, engine = pipeline.make(SEED)
    out = tmp_path_factory.mktemp("run")
    with engine:
        with train.JsonLines(out) as lines:
            curve = pipeline.learn(trainer, engine, STEPS, seed=SEED, sinks=[lines])
        yield SimpleNamespace(
            definition=definition, trainer=trainer, engine=engine, curve=curve, metrics=out / "metrics.jsonl"
        )


def update(run, params=None, *, copy=False):
    """Hand over parameters, by default the trainer's."""
    version = int(run.engine.stats()["version"]) + 1
    run.engine.update_params(run.trainer.params if params is None else params, version, copy=copy)
    return version


def test_the_reward_rises(run):
    """Breaks when advantages, masks or log-probabilities are off by a place: then nothing is learned."""
    first, last = np.mean(run.curve[: STEPS // 4]), np.mean(run.curve[-STEPS // 4 :])
    assert len(run.curve) == STEPS
    assert first < 0.35
    assert last > 0.75


def test_every_step_is_on_policy(run):
    """Breaks when the engine samples from other parameters than those that the step differentiates."""
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["mismatch"] for row in rows) < 1e-5


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_in_another_process(run, tmp_path):
    """Breaks when a reply depends on time, on threads or on what else was in its batch."""
    options = {"steps": STEPS, "seed": SEED, "out": tmp_path / "out"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    settings = {"env": os.environ | {"JAX_PLATFORMS": "cpu"}, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run([sys.executable, str(PIPELINES / "reinforce.py"), *words], check=False, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == run.metrics.read_bytes()
    assert f"step {STEPS // 10 * 10}: " in done.stdout


def test_trainer_and_engine_agree_on_every_token(pipeline, run):
    """Breaks when the paged forward and the dense one differ, for the trained policy and for large random weights."""
    random = np.random.default_rng(0)
    large = jax.tree.map(lambda x: 0.4 * random.standard_normal(x.shape, np.float32), run.trainer.params)
    likelihood = jax.jit(functools.partial(pipeline.log_likelihood, run.definition))
    for params in (run.trainer.params, jax.tree.map(jnp.asarray, large)):
        update(run, params)
        asked = pipeline.requests(SEED, 1)
        rows = pipeline.batch(asked, pipeline.sample(run.engine, asked))
        assert rows.sampled.sum() == len(asked) * pipeline.REPLY
        values = np.asarray(likelihood(params, rows.tokens)) * rows.sampled
        np.testing.assert_allclose(rows.logprobs, values, rtol=0, atol=1e-5)


def test_a_donated_step_takes_the_parameters_from_the_engine(pipeline, run):
    """Breaks when a reply can come from parameters that are gone, or an update does not bring the engine back."""
    asked = pipeline.requests(SEED, 1)
    before = update(run)
    replies = pipeline.sample(run.engine, asked)
    assert {version for reply in replies for version in reply.versions} == {before}

    run.engine.pause()
    waiting = run.engine.submit(asked[0])  # accepted, then overtaken by the step
    lent = jax.tree.leaves(run.trainer.params)
    run.trainer.step(pipeline.batch(asked, replies))
    assert all(leaf.is_deleted() for leaf in lent)
    run.engine.resume()
    overtaken = protocols.Completion.join(list(waiting))
    assert (overtaken.finish_reason, overtaken.token_ids) == ("error", ())
    assert "update_params" in overtaken.error
    for refused in (run.engine.submit, lambda request: run.engine.generate([request])):
        with pytest.raises(RuntimeError, match="update_params"):
            refused(asked[0])

    after = update(run)
    assert after == before + 1
    again = pipeline.sample(run.engine, asked)
    assert {version for reply in again for version in reply.versions} == {after}
    assert [reply.logprobs for reply in again] != [reply.logprobs for reply in replies]


def test_replies_that_fail_end_the_run(pipeline, run):
    """Breaks when a batch is made of replies that the engine could not finish."""
    update(run, jax.tree.map(lambda x: x * jnp.nan, run.trainer.params))
    with pytest.raises(RuntimeError, match="64 of 64 replies failed, the first with: the logits of token"):
        pipeline.sample(run.engine, pipeline.requests(SEED, 1))


def test_rewards_and_advantages(pipeline):
    """Breaks when a reward is counted for the wrong place or a baseline contains the reply's own reward."""
    assert pipeline.reward([7, 8], [9, 0, 1, 2]) == 1
    assert pipeline.reward([7, 8], [9, 9, 0, 5]) == 0.5
    asked = pipeline.requests(0, 1)[: pipeline.GROUP]
    right = [(asked[0].prompt[-1] + 1 + i) % 10 for i in range(pipeline.REPLY)]
    wrong = [asked[0].prompt[-1]] * pipeline.REPLY
    chosen = [right] + [wrong] * (pipeline.GROUP - 1)
    logprobs = (protocols.TokenLogprob(-0.5),) * pipeline.REPLY
    finish = functools.partial(protocols.Completion, text="", finish_reason="length", logprobs=logprobs)
    rows = pipeline.batch(asked, [finish(token_ids=tuple(reply)) for reply in chosen])
    np.testing.assert_allclose(rows.rewards, [1] + [0] * (pipeline.GROUP - 1))
    np.testing.assert_allclose(rows.advantages, [1] + [-1 / (pipeline.GROUP - 1)] * (pipeline.GROUP - 1), rtol=1e-6)
    start = len(asked[0].prompt)
    assert rows.tokens[0, start : start + pipeline.REPLY].tolist() == right
    assert rows.tokens[:, 1:][rows.sampled > 0].tolist() == [digit for reply in chosen for digit in reply]
    np.testing.assert_array_equal(rows.logprobs, -0.5 * rows.sampled)


def test_the_loss_meets_its_contract(pipeline, run):
    """Breaks when a sum or weight does not add up over rows, so that accumulation would change the gradient."""
    update(run)
    asked = pipeline.requests(SEED, 1)
    rows = pipeline.batch(asked, pipeline.sample(run.engine, asked))
    rows = rows._replace(logprobs=np.zeros_like(rows.logprobs))  # a mismatch of rounding alone adds up to rounding
    testing.check_loss(pipeline.policy_gradient(run.definition), run.trainer.params, rows)
