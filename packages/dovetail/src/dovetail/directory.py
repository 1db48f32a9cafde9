"""The directory of a run: never overwritten silently, resumable at any moment."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dovetail.config import ConfigError, build, dump
from dovetail.settings import Settings
from dovetail_protocols import CommandError

__all__ = ["RunDirectory"]

RECORD = "run.json"


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its files.

    ``run.json`` is written before step 0 and says what the run is; a directory with it is a run.
    """

    path: Path

    @classmethod
    def prepare(cls, path: Path, *, resume: bool, overwrite: bool) -> "RunDirectory":
        """Return the directory of a new run, or of the one to resume.

        Raises:
            CommandError: it holds a run and neither option was given, both were given, it holds something else, or
                there is nothing to resume.
        """
        if resume and overwrite:
            raise CommandError("--resume and --overwrite exclude each other; choose one")
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise CommandError(f"{path} is a file; choose another directory with --out")
        if run.exists and not (resume or overwrite):
            raise CommandError(f"{path} holds a run; add --resume to continue it or --overwrite to start again")
        if path.exists() and any(path.iterdir()) and not run.exists and not run.begun:
            raise CommandError(f"{path} is not empty and holds no run; choose another directory with --out")
        if resume and not (run.exists or run.begun):
            raise CommandError(f"{path} holds no run to resume; leave --resume out to start one")
        if overwrite and path.exists():
            shutil.rmtree(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / ".dovetail").touch()
        except OSError as error:
            raise CommandError(f"cannot write to {path}: {error.strerror}") from error
        return run

    @property
    def exists(self) -> bool:
        """Whether a run was planned here."""
        return (self.path / RECORD).exists()

    @property
    def begun(self) -> bool:
        """Whether a run began here, perhaps without getting as far as its plan."""
        return (self.path / ".dovetail").exists()

    def load(self) -> tuple[Settings, dict[str, str]] | None:
        """Return the settings and the environment of the run, or None where none was planned yet.

        Raises:
            CommandError: the record is damaged or from another version.
        """
        if not self.exists:
            return None
        try:
            record = json.loads((self.path / RECORD).read_text())
            return build(Settings, record["settings"], str(self.path / RECORD)), record["environment"]
        except (ValueError, KeyError, ConfigError) as error:
            raise CommandError(f"{self.path / RECORD} is damaged ({error}); --overwrite starts again") from error

    def save(self, settings: Settings, environment: dict[str, str]) -> None:
        """Write the record, atomically."""
        record: dict[str, Any] = {"settings": dump(settings), "environment": environment}
        temporary = self.path / f"{RECORD}.tmp"
        with temporary.open("w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / RECORD)
