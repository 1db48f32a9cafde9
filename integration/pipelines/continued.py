"""What pipelines that change a trained model share: text, a training run of so many minutes, curves, their plot.

Runs of different models are given the same minutes on the same machine: what a step costs is part of the answer. The
learning rate is planned over the steps that fit, which are found by timing some first.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import dovetail_data as data
import dovetail_models as models
import dovetail_optim as optim
import dovetail_text as text
import dovetail_train as train

SEQ_LEN, BATCH, VOCAB = 128, 16, 2048
EVALUATIONS, VALID_BATCHES = 8, 8


class Text(NamedTuple):
    """The standard library of Python as tokens.

    Attributes:
        tokenizer: trained on it.
        training: what is trained on.
        held_out: what is evaluated on.
    """

    tokenizer: text.Tokenizer
    training: Any
    held_out: Any


class Point(NamedTuple):
    """One evaluation: steps and seconds of training so far, and the loss on held-out text in bits per byte."""

    step: int
    seconds: float
    bits_per_byte: float


def prepare(out: Path, seed: int, corpus: data.Corpus | None = None) -> Text:
    """Train a tokenizer and tokenise the text, once for all seeds."""
    if not (out / "cache").exists():
        documents = data.python_corpus() if corpus is None else corpus
        tokenizer = text.train_bpe((document.text for document in documents), VOCAB)
        tokenizer.save_pretrained(out / "tokenizer")
        data.build_cache(documents, tokenizer, out / "cache")
    tokenizer = text.Tokenizer.from_pretrained(out / "tokenizer")
    return Text(tokenizer, *data.TokenCache.open(out / "cache").split(0.05, seed=seed))


def llama(given: Text, seed: int) -> models.Llama:
    """A model of 1.2 million parameters."""
    config = models.LlamaConfig(
        vocab_size=given.tokenizer.vocab_size, features=128, hidden=352, layers=4, heads=4, kv_heads=2, tied=True
    )
    return models.Llama(config, rngs=nnx.Rngs(seed))


def run(
    model: Any, given: Text, minutes: float, *, rate: float, seed: int, trained: str | Sequence[str] = "**"
) -> tuple[Any, list[Point]]:
    """Train a model for so many minutes; return it, and its curve from before the first step on.

    Args:
        model: with any parameters.
        given: from `prepare`.
        minutes: of training steps; evaluations, the compilation and the timed steps come on top.
        rate: the highest learning rate; it rises for a twentieth of the steps, and falls over the last half.
        seed: of the order of the data.
        trained: patterns of the parameters that are trained.
    """
    definition, params = models.split(model)
    loss = train.next_token(definition)
    plan = data.Plan(given.training, seq_len=SEQ_LEN, batch=BATCH, seed=seed)
    valid = [data.Plan(given.held_out, seq_len=SEQ_LEN, batch=BATCH, seed=0).at(step) for step in range(VALID_BATCHES)]
    scored = jax.jit(loss)

    def held_out(params: Any) -> float:
        terms = [scored(params, batch) for batch in valid]
        nats = float(sum(term.sum for term in terms)) / float(sum(term.weight for term in terms))
        return given.held_out.bits_per_byte(nats)

    def optimizer(steps: int) -> Any:
        schedule = optim.wsd(rate, steps, warmup=max(1, steps // 20), decay=max(1, steps // 2))
        return optim.adamw(schedule, clip_norm=1.0)

    timed = _compiled(train.Trainer(params, loss, optimizer(100), trained=trained), plan)
    steps = max(EVALUATIONS, int(60 * minutes / _seconds_per_step(timed, plan)))
    trainer = _compiled(train.Trainer(params, loss, optimizer(steps), trained=trained), plan)
    curve, spent = [Point(0, 0.0, held_out(params))], 0.0
    for part in range(EVALUATIONS):
        stop = steps * (part + 1) // EVALUATIONS
        started = time.perf_counter()
        for step in range(curve[-1].step, stop):
            trainer.step(plan.at(step))
        jax.block_until_ready(trainer.params)
        spent += time.perf_counter() - started
        curve.append(Point(stop, spent, held_out(trainer.params)))
    return models.merge(definition, jax.tree.map(jnp.copy, trainer.params)), curve


def _compiled(trainer: train.Trainer, plan: Any) -> train.Trainer:
    """Take a step, so that no later one compiles anything, and return the trainer as it was before."""
    before = jax.tree.map(jnp.copy, trainer.state)
    jax.block_until_ready(trainer.step(plan.at(0)))
    trainer.state = before
    return trainer


def _seconds_per_step(trainer: train.Trainer, plan: Any, count: int = 10) -> float:
    jax.block_until_ready(trainer.step(plan.at(0)))
    started = time.perf_counter()
    for step in range(1, 1 + count):
        trainer.step(plan.at(step))
    jax.block_until_ready(trainer.params)
    return (time.perf_counter() - started) / count


def seeds(
    parser: argparse.ArgumentParser, name: str, compare: Callable[[Path, float, int], dict[str, list[Point]]]
) -> None:
    """Run ``compare(out, minutes, seed)`` for every seed that is asked for; print and write what came out.

    The first curve is what the second is to beat.
    """
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    curves = list[dict[str, list[Point]]]()
    for seed in range(options.seeds):
        curves.append(compare(options.out, options.minutes, seed))
        for label, curve in curves[-1].items():
            ends = " to ".join(f"{point.bits_per_byte:.4f}" for point in (curve[0], curve[-1]))
            print(f"seed {seed}, {label}: {ends} bits per byte in {curve[-1].step} steps", flush=True)
    command = f"python integration/pipelines/{name}.py --minutes {options.minutes:g} --seeds {options.seeds}"
    write(options.out, name, curves, command)
    known, new = (statistics.median(one[label][-1].bits_per_byte for one in curves) for label in curves[0])
    print(f"median: {known:.4f} against {new:.4f}: {'better' if new < known else 'a miss'}")


def write(out: Path, name: str, curves: Sequence[Mapping[str, Sequence[Point]]], command: str) -> None:
    """Write the curves of every seed as JSON and, with the median of the seeds, as SVG."""
    rows = [{label: [list(point) for point in curve] for label, curve in one.items()} for one in curves]
    (out / f"{name}.json").write_text(json.dumps({"command": command, "seeds": rows}, indent=1) + "\n")
    (out / f"{name}.svg").write_text(_plot(curves))


def _plot(curves: Sequence[Mapping[str, Sequence[Point]]]) -> str:
    import io

    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for color, label in enumerate(curves[0]):
        lines = [np.array([point[1:] for point in one[label]]) for one in curves]
        for line in lines:
            axes.plot(*line.T, color=f"C{color}", linewidth=0.6, alpha=0.5)
        axes.plot(*np.median(lines, axis=0).T, color=f"C{color}", marker="o", markersize=3, label=label)
    axes.set(xlabel="seconds of training steps", ylabel="held-out text (bits per byte)")
    axes.legend()
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dovetail", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
