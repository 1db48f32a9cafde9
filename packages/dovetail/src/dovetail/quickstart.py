"""``dovetail quickstart``: the whole line on text that every machine has, in a few minutes."""

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dovetail_protocols import CommandError

if TYPE_CHECKING:
    from dovetail.directory import RunDirectory
    from dovetail.settings import Settings
    from dovetail.stages import Pretraining
    from dovetail.ui import UI

__all__ = ["Quickstart"]

PROMPTS = ("def __init__(self", "import os\n", "class")
LEAST_STEPS = 20
Pair: TypeAlias = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train a small model on Python's standard library (or your text), evaluate it, export it and write a report."""

    corpus: tuple[Path, ...] = ()
    """Directories and files of text, JSONL or Parquet; without any, the standard library's sources."""
    out: Path = Path("runs/quickstart")
    """Directory of the run."""
    preset: Literal["tiny", "small"] = "small"
    """Size of the model and of its batches."""
    minutes: float = 3.0
    """Time for training; the number of steps follows from a measurement and is written down before step 0."""
    steps: int | None = None
    """Number of training steps, instead of a time."""
    seed: int = 0
    """Of initial weights, data order and samples."""
    resume: bool = False
    """Continue the run in the directory, with exactly the numbers of an uninterrupted one."""
    overwrite: bool = False
    """Delete a run that is in the directory, and start again."""

    def run(self) -> int:
        """Run the line; the status is 3 when it was stopped early and can be resumed."""
        from dovetail.directory import RunDirectory
        from dovetail.memory import keep_pages
        from dovetail.pretrain import complete, user_errors
        from dovetail.ui import UI

        keep_pages()
        self._check()
        for name in ("dovetail_engine", "dovetail_serve", "openai"):  # the last stages must not find them missing
            importlib.import_module(name)
        ui = UI()
        with user_errors():
            directory = RunDirectory.prepare(self.out, resume=self.resume, overwrite=self.overwrite)
            job = complete(self._settings(directory), directory, ui, plan=lambda job, s: self._plan(job, s, ui))
            if job is None:
                ui.say(f"stopped; continue with: dovetail quickstart --out {self.out} --resume")
                return 3
            finish(job, self.out, self.seed, ui)
        return 0

    def _check(self) -> None:
        if not self.minutes > 0:
            raise CommandError(f"--minutes {self.minutes}; expected a positive number")
        if self.steps is not None and self.steps < 1:
            raise CommandError(f"--steps {self.steps}; expected at least 1")

    def _settings(self, directory: "RunDirectory") -> "Settings":
        from dovetail.pretrain import unchanged
        from dovetail.settings import PRESETS

        given = {"corpus": self.corpus, "seed": self.seed, "steps": self.steps}
        recorded = directory.load()
        if recorded is not None:
            chosen: dict[str, Any] = {name: value for name, value in given.items() if value}
            if self.preset != "small":
                chosen["model"] = PRESETS[self.preset].model
            return unchanged(recorded[0], chosen)
        return dataclasses.replace(PRESETS[self.preset], **given | {"steps": self.steps or LEAST_STEPS})

    def _plan(self, job: "Pretraining", settings: "Settings", ui: "UI") -> "Settings":
        """Turn minutes into steps: the rate is measured once, before anything of the run is written."""
        if self.steps is not None:
            return settings
        with ui.stage("Rate"):
            seconds = job.measure()
            steps = max(LEAST_STEPS, int(self.minutes * 60 / seconds))
            ui.say(f"{seconds * 1e3:.0f} ms per step: {steps} steps in {self.minutes:g} minutes")
        return dataclasses.replace(settings, steps=steps)


def finish(job: "Pretraining", out: Path, seed: int, ui: "UI") -> None:
    """Evaluate the trained model, serve it and ask it, write the report and say what to do next."""
    with ui.stage("Evaluation"):
        results, unigram = _examine(job, out, ui)
    with ui.stage("Serving"):
        try:
            samples, speed = _serve(out, seed, ui)
        except CommandError as error:  # what was trained deserves its report all the same
            samples, speed = [], [("serving failed", str(error))]
            ui.say(f"serving failed: {error}")
        results += speed
    nexts = (
        ("serve the model over the OpenAI API", f"dovetail serve {out / 'model'}"),
        ("continue a text", f"dovetail generate {out / 'model'} 'import os'"),
        ("look at the checkpoints", f"dovetail checkpoint ls {out / 'checkpoints'}"),
        ("check them", f"dovetail checkpoint verify {out / 'checkpoints'} --all"),
        ("see a training batch", f"dovetail data show {out / 'cache'} --step 0 --tokenizer {out / 'tokenizer'}"),
        ("train on your own text", "dovetail train --corpus DIR --out runs/mine"),
    )
    with ui.stage("Report"):
        from dovetail.report import Report, write

        report = Report("Dovetail quickstart", job.facts(), results, samples, dict(ui.seconds), nexts)
        write(out / "report.html", report, out, reference=("unigram", unigram))
        ui.say(f"{out / 'report.html'}")
    ui.console.print("[bold]Next:[/]")
    for what, command in nexts:
        ui.say(f"{what}: {command}")


def _serve(out: Path, seed: int, ui: "UI") -> tuple[list[Pair], list[Pair]]:
    """Ask the exported model over the OpenAI API; return what it answered, and how fast."""
    from dovetail.serving import ask

    answers, ready = ask(out / "model", PROMPTS, max_tokens=96, seed=seed)
    samples = [(prompt, prompt + answer.text) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    for _, text in samples:
        ui.console.print(text, style="green", markup=False)
    tokens, seconds = sum(answer.tokens for answer in answers), sum(answer.seconds for answer in answers)
    first = min(answer.first_seconds for answer in answers)
    ui.say(f"ready in {ready:.1f} s, then {tokens / seconds:,.0f} tokens per second, one request at a time")
    return samples, [
        ("server ready after", f"{ready:.1f} s"),
        ("first text of an answer after", f"{first * 1e3:.0f} ms"),
        ("answers", f"{tokens} tokens, {tokens / seconds:,.0f} per second, one request at a time"),
    ]


def _examine(job: "Pretraining", out: Path, ui: "UI") -> tuple[list[Pair], float]:
    """Return results for the report, and the unigram baseline in bits per byte."""
    import dovetail_data

    means = job.evaluation(job.trainer.params)
    unigram = dovetail_data.unigram_bits_per_byte(job.train_view, job.evaluation.view)
    ui.say(f"validation: {means['bits_per_byte']:.3f} bits per byte; unigram baseline: {unigram:.3f}")
    results = [
        ("validation", f"{means['bits_per_byte']:.3f} bits per byte"),
        ("unigram baseline", f"{unigram:.3f} bits per byte"),
        ("validation loss", f"{means['loss']:.3f} nats per token"),
        *job.results(out),
    ]
    return results, unigram
