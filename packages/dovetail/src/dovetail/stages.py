"""The stages from text to a trained model, each a few calls of the packages' public APIs."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dovetail_checkpoint
import dovetail_data
import dovetail_models
import dovetail_optim
import dovetail_profile
import dovetail_runtime
import dovetail_text
import dovetail_train
from dovetail.pretrained import llama_config
from dovetail.settings import Settings
from dovetail.ui import UI, TrainingBar
from dovetail_protocols import CommandError

__all__ = ["Evaluation", "Pretraining", "environment", "export", "open_corpus", "token_cache", "tokenizer_for"]


def environment() -> dict[str, str]:
    """Return what changes numerics besides the settings."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "processes": str(jax.process_count()),
        "threads": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }


def open_corpus(settings: Settings) -> dovetail_data.Corpus:
    """Return the user's corpus, or the standard library's sources."""
    return dovetail_data.open_corpus(*settings.corpus) if settings.corpus else dovetail_data.python_corpus()


def tokenizer_for(settings: Settings, corpus: dovetail_data.Corpus, directory: Path, ui: UI) -> dovetail_text.Tokenizer:
    """Return the tokenizer of the run from its directory, training or copying it there the first time."""
    if (directory / "tokenizer.json").exists():  # written last
        return dovetail_text.Tokenizer.from_pretrained(directory)
    if settings.tokenizer is not None:
        tokenizer = dovetail_text.Tokenizer.from_pretrained(settings.tokenizer)
    else:
        size = corpus.summary.bytes
        with ui.bar("reading", size) as show:
            texts = (document.text for document in corpus)
            tokenizer = dovetail_text.train_bpe(
                texts, settings.vocab_size, progress=lambda n, chars: show(chars, f"{n} documents")
            )
    tokenizer.save_pretrained(directory)
    return tokenizer


def token_cache(
    corpus: dovetail_data.Corpus, tokenizer: dovetail_text.Tokenizer, directory: Path, ui: UI
) -> dovetail_data.TokenCache:
    """Return the token cache of the run, building what is not there yet."""
    with ui.bar("tokenising", corpus.summary.bytes) as show:
        return dovetail_data.build_cache(
            corpus, tokenizer, directory, progress=lambda p: show(p.bytes, f"{p.tokens:,} tokens")
        )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss on a view of held-out documents."""

    view: dovetail_data.TokenView
    loss: Callable[[Any, Any], Any]
    plan: dovetail_data.Plan
    put: Callable[[Any], Any]

    def __call__(self, params: Any, limit: int | None = None) -> dict[str, float]:
        """Return the mean loss in nats per token and the bits per byte, over the first `limit` batches or all."""
        means = dovetail_train.evaluate(self.loss, params, self.batches(limit), put=self.put)
        return {"loss": means["loss"], **self.derive(means)}

    def batches(self, limit: int | None) -> list[Any]:
        """Return the first batches of the view; always the same ones."""
        count = self.plan.steps or 0
        return [self.plan.at(step) for step in range(count if limit is None else min(limit, count))]

    def derive(self, means: dict[str, float]) -> dict[str, float]:
        """Convert nats per token into bits per byte."""
        return {"bits_per_byte": self.view.bits_per_byte(means["loss"])}


class Pretraining:
    """A model, its data and its trainer, as the settings describe them.

    Attributes:
        settings: of the run.
        definition: static part of the model.
        trainer: holds the parameters.
        train_plan: the batches.
        evaluation: of the held-out documents.
    """

    def __init__(self, settings: Settings, tokenizer: dovetail_text.Tokenizer, cache: dovetail_data.TokenCache) -> None:
        self.settings = settings
        train, valid = cache.split(settings.validation, seed=settings.seed)
        plan = functools.partial(dovetail_data.Plan, seq_len=settings.seq_len, batch=settings.batch)
        self.train_view, self.train_plan = train, plan(train, seed=settings.seed)
        build = self._builder(tokenizer.vocab_size)
        self.definition, params = dovetail_models.split(build())
        loss = dovetail_train.next_token(self.definition)
        mesh = dovetail_runtime.mesh(data=-1) if jax.device_count() > 1 else None
        if mesh is not None and settings.batch % (jax.device_count() * settings.accumulate):
            raise CommandError(f"batch={settings.batch} rows do not divide over {jax.device_count()} devices")
        self.trainer = dovetail_train.Trainer(
            params,
            loss,
            self._optimizer(),
            accumulate=settings.accumulate,
            mesh=mesh,
            rules=None if mesh is None else dovetail_runtime.DATA,
        )
        self.evaluation = Evaluation(valid, jax.jit(loss), plan(valid, seed=0, epochs=1), self.trainer.put)

    def _builder(self, vocab_size: int) -> Callable[[], dovetail_models.Llama]:
        config = llama_config(self.settings, vocab_size)
        return lambda: dovetail_models.Llama(config, rngs=nnx.Rngs(self.settings.seed))

    @property
    def schedule(self) -> Callable[[Any], Any]:
        """The learning rate by step."""
        steps, options = self.settings.steps, self.settings.optimizer
        warmup, decay = round(steps * options.warmup), round(steps * options.decay)
        return dovetail_optim.wsd(options.learning_rate, steps, warmup=warmup, decay=decay)

    def _optimizer(self) -> Any:
        options = self.settings.optimizer
        return dovetail_optim.adamw(
            self.schedule,
            b2=options.beta2,
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm,
        )

    def measure(self, steps: int = 6) -> float:
        """Return the seconds of one step (median), compiled and warm; the trainer's state moves on."""
        times = list[float]()
        for step in range(steps + 1):
            started = time.perf_counter()
            jax.block_until_ready(self.trainer.step(self.train_plan.at(step)))
            times.append(time.perf_counter() - started)
        return float(np.median(times[1:]))

    def run(
        self,
        directory: Path,
        checkpoints: dovetail_checkpoint.Manager,
        ui: UI,
        *,
        stop: Callable[[int], bool] | None = None,
    ) -> int:
        """Train to the end, from the latest checkpoint if there is one; return the step that was reached."""
        settings = self.settings
        loader = iter(self.train_plan.loader(process_index=jax.process_index(), process_count=jax.process_count()))
        first = 0
        if checkpoints.steps():
            first = self.trainer.restore(checkpoints, data=loader)
            ui.say(f"continuing at step {first}")
        hooks = (
            dovetail_train.Evaluate(
                self.evaluation.loss,
                lambda: self.evaluation.batches(settings.eval_batches),
                settings.eval_every,
                derive=self.evaluation.derive,
            ),
            dovetail_train.Checkpoint(checkpoints, settings.checkpoint_every, loader),
        )
        with dovetail_train.JsonLines(directory, resume=first) as lines, TrainingBar(ui, first, settings.steps) as bar:
            reached = self.trainer.fit(
                loader,
                settings.steps,
                hooks=hooks,
                sinks=[lines, bar],
                throughput=self.throughput(),
                scalars={"learning_rate": self.schedule},
                stop=stop,
            )
        checkpoints.wait()
        return reached

    def describe(self) -> str:
        """Say what will be trained, on what, for how long."""
        size = sum(x.size for x in jax.tree.leaves(self.trainer.params))
        tokens = self.settings.steps * self.settings.batch * self.settings.seq_len
        return f"{size:,} parameters, {self.settings.steps} steps, {tokens:,} tokens on {jax.device_count()} device(s)"

    def throughput(self) -> dovetail_train.Throughput:
        """Return tokens and operations of one step, and the machine's measured matmul rate."""
        flops = self.trainer.flops(self.train_plan.at(0))
        peak = dovetail_profile.peak_flops() * jax.device_count()
        return dovetail_train.Throughput(self.settings.batch * self.settings.seq_len, flops, peak)

    def facts(self) -> list[tuple[str, str]]:
        """Return what ran, for the report."""
        settings = self.settings
        corpus = ", ".join(map(str, settings.corpus)) or "the standard library's sources"
        model = settings.model
        return [
            ("corpus", f"{corpus}: {len(self.train_view) + len(self.evaluation.view)} documents"),
            ("training tokens", f"{self.train_view.tokens:,} in the corpus"),
            (
                "model",
                f"Llama, {model.layers} layers, {model.features} features, vocabulary {self.train_view.vocab_size}",
            ),
            ("training", self.describe()),
            ("seed", str(settings.seed)),
            *environment().items(),
        ]

    def results(self, run: Path) -> list[tuple[str, str]]:
        """Return throughput and memory, for the report."""
        lines = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
        median = {name: float(np.median([line[name] for line in lines])) for name in ("tokens_per_second", "mfu")}
        explanation = self.trainer.explain(self.train_plan.at(0))
        peak = dovetail_profile.process_memory().peak_rss or 0
        return [
            ("throughput", f"{median['tokens_per_second']:,.0f} tokens per second"),
            ("of the matmul rate", f"{median['mfu']:.0%}"),
            ("step", str(explanation)),
            ("peak memory of the process", f"{peak / 2**20:,.0f} MiB"),
        ]

    def model(self) -> dovetail_models.Llama:
        """Return the model with a copy of the present parameters."""
        return dovetail_models.merge(self.definition, jax.tree.map(jnp.copy, self.trainer.params))


def export(job: Pretraining, tokenizer: Path, directory: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face directory, replacing an earlier export."""
    ids = dovetail_text.Tokenizer.from_pretrained(tokenizer)
    token_ids = {"eos_token_id": list(ids.eos_ids)} | ({} if ids.bos_id is None else {"bos_token_id": ids.bos_id})
    dovetail_models.save_pretrained(job.model(), directory, tokenizer=tokenizer, token_ids=token_ids, overwrite=True)
