"""What a run shows on the terminal: headed stages, progress bars, plain lines where there is no terminal."""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["UI", "TrainingBar"]


class UI:
    """Prints to one console and remembers how long each stage took.

    Attributes:
        console: a rich console.
        seconds: ``{stage: seconds}``.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.seconds = dict[str, float]()

    def say(self, text: str) -> None:
        """Print a line of plain text."""
        self.console.print(f"  {text}", markup=False)

    @contextlib.contextmanager
    def stage(self, title: str) -> Generator[None]:
        """Head a stage and time it."""
        self.console.print(f"[bold cyan]{len(self.seconds) + 1}. {title}[/]")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started

    @contextlib.contextmanager
    def bar(self, label: str, total: float | None, unit: str = "") -> Generator[Callable[[float, str], None]]:
        """Show a progress bar; the function takes what is done and a text to show beside it."""
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        hidden = not self.console.is_terminal
        with Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=True, disable=hidden
        ) as progress:
            task = progress.add_task(label, total=total, note=unit)
            yield lambda done, note: progress.update(task, completed=done, note=note)


class TrainingBar:
    """A sink that shows step, loss, rate and time left; without a terminal, a line for each tenth of the run."""

    def __init__(self, ui: UI, first: int, steps: int) -> None:
        self._ui, self._steps, self._loss = ui, steps, float("nan")
        columns = (TextColumn("  training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        hidden = not ui.console.is_terminal
        self._progress = Progress(*columns, TimeRemainingColumn(), console=ui.console, transient=True, disable=hidden)
        self._task = self._progress.add_task("training", total=steps, completed=first, note="")

    def __enter__(self) -> "TrainingBar":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Remember the loss; print evaluations."""
        self._loss = values.get("loss", self._loss)
        if "valid/bits_per_byte" in values:
            self._ui.say(f"step {step}: validation {values['valid/bits_per_byte']:.3f} bits per byte")

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar."""
        note = f"loss {self._loss:.3f}, {values.get('tokens_per_second', 0):,.0f} tokens/s"
        self._progress.update(self._task, completed=step, note=note)
        if not self._ui.console.is_terminal and (step * 10 // self._steps) != ((step - 1) * 10 // self._steps):
            self._ui.say(f"step {step}/{self._steps}: {note}")

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()
