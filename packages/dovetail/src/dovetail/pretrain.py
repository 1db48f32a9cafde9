"""``dovetail train``: pretrain a language model on a corpus, as flags and a ``--config`` file describe it."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.settings import Settings
from dovetail_protocols import CommandError

if TYPE_CHECKING:
    from dovetail.directory import RunDirectory
    from dovetail.stages import Pretraining
    from dovetail.ui import UI

__all__ = ["Train", "complete", "unchanged", "user_errors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Settings):
    """Pretrain a language model on a corpus: tokenizer, token cache, training, checkpoints, evaluation, export."""

    out: Path = Path("runs/train")
    """Directory of the run."""
    resume: bool = False
    """Continue the run in the directory, with exactly the numbers of an uninterrupted one."""
    overwrite: bool = False
    """Delete a run that is in the directory, and start again."""

    def run(self) -> int:
        """Train; the status is 3 when the run was stopped early and can be resumed."""
        from dovetail.directory import RunDirectory
        from dovetail.memory import keep_pages
        from dovetail.ui import UI

        keep_pages()
        ui = UI()
        with user_errors():
            directory = RunDirectory.prepare(self.out, resume=self.resume, overwrite=self.overwrite)
            finished = complete(self._settings(directory), directory, ui)
        if finished is None:
            ui.say(f"stopped; continue with: dovetail train --out {self.out} --resume")
            return 3
        return 0

    def _settings(self, directory: "RunDirectory") -> Settings:
        names = [field.name for field in dataclasses.fields(Settings)]
        recorded = directory.load()
        if recorded is None:
            return Settings(**{name: getattr(self, name) for name in names})
        default = Settings()
        given = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}
        return unchanged(recorded[0], given)


def unchanged(recorded: Settings, given: Mapping[str, Any]) -> Settings:
    """Return the settings of a run that is resumed.

    Raises:
        CommandError: an option that was given contradicts them.
    """
    for name, wanted in given.items():
        if wanted != getattr(recorded, name):
            raise CommandError(
                f"{name}={wanted!r}, but the run has {getattr(recorded, name)!r}; a resumed run keeps its settings "
                "(leave the option out, or --overwrite to start again)"
            )
    return recorded


@contextlib.contextmanager
def user_errors() -> Generator[None]:
    """Turn what a user can mend (options, files, disks) into `CommandError`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def complete(
    settings: Settings,
    directory: "RunDirectory",
    ui: "UI",
    *,
    plan: "Callable[[Pretraining, Settings], Settings] | None" = None,
) -> "Pretraining | None":
    """Run all stages that are not done yet, up to the exported model; None when the run was stopped early.

    Args:
        settings: of the run.
        directory: where the run lives.
        ui: the terminal.
        plan: decides the final settings of a new run from a measurement, before step 0.
    """
    import dovetail_runtime
    from dovetail import stages

    dovetail_runtime.initialize()
    recorded = directory.load()
    corpus = stages.open_corpus(settings)
    with ui.stage("Tokenizer"):
        tokenizer = stages.tokenizer_for(settings, corpus, directory.path / "tokenizer", ui)
        ui.say(f"{corpus.summary.documents} documents, {corpus.summary.bytes:,} bytes; {tokenizer.vocab_size} tokens")
    with ui.stage("Token cache"):
        cache = stages.token_cache(corpus, tokenizer, directory.path / "cache", ui)
        ui.say(f"{cache.tokens:,} tokens, {cache.bytes / cache.tokens:.2f} bytes each")
    environment = stages.environment()
    if recorded is None:
        settings = settings if plan is None else plan(stages.Pretraining(settings, tokenizer, cache), settings)
        directory.save(settings, environment)
    else:
        _report_changes(recorded[1], environment, ui)
    with ui.stage("Pretraining"):
        job = stages.Pretraining(settings, tokenizer, cache)
        reached = _train(job, directory, ui)
    if reached < settings.steps:
        return None
    with ui.stage("Export"):
        stages.export(job, directory.path / "tokenizer", directory.path / "model")
        ui.say(f"{directory.path / 'model'} opens with transformers and with dovetail_models")
    return job


def _train(job: "Pretraining", directory: "RunDirectory", ui: "UI") -> int:
    import dovetail_checkpoint
    import dovetail_runtime

    ui.say(job.describe())
    keep = dovetail_checkpoint.latest(3)
    with (
        dovetail_checkpoint.Manager(directory.path / "checkpoints", keep=keep) as checkpoints,
        dovetail_runtime.preemption(sigint=True) as flag,
    ):
        return job.run(directory.path, checkpoints, ui, stop=flag)


def _report_changes(before: dict[str, str], now: dict[str, str], ui: "UI") -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            ui.say(f"note: {name} was {before.get(name)} and is {now.get(name)}; numbers may differ in the last bits")
