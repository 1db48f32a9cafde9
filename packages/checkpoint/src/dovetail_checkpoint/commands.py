"""Commands over checkpoint directories. They read manifests and bytes, and load neither jax nor Orbax."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from dovetail_checkpoint import _files, _json
from dovetail_checkpoint.errors import CorruptCheckpointError
from dovetail_checkpoint.manifest import Manifest, verify

__all__ = ["List", "Show", "Verify"]


@dataclasses.dataclass(frozen=True)
class List:
    """List the steps of a checkpoint directory with their sizes, times and metrics."""

    directory: Path
    """The directory that was given to the manager."""

    def run(self) -> int:
        """Print a line per step; 1 when a manifest cannot be read."""
        numbers, status = _listed(self.directory), 0
        print(f"{'step':>10}  {'size':>9}  {'files':>5}  {'committed':<25}  metrics")
        for number in numbers:
            try:
                manifest = Manifest.read(self.directory / str(number))
            except CorruptCheckpointError as error:
                print(f"{number:>10}  {error}")
                status = 1
                continue
            cells = f"{_size(manifest.size):>9}  {len(manifest.files):>5}  {manifest.created:<25}"
            print(f"{number:>10}  {cells}  {_metrics(manifest.metrics)}".rstrip())
        for name in _files.quarantined(self.directory):
            print(f"{name:>10}  quarantined")
        return status


@dataclasses.dataclass(frozen=True)
class Show:
    """Show what a step holds: leaves with shapes, dtypes and shardings, metadata, versions."""

    directory: Path
    """The directory that was given to the manager."""
    step: int | None = None
    """Which step; default the latest."""

    def run(self) -> None:
        """Print the manifest as a table."""
        number = _chosen(self.directory, self.step)
        try:
            manifest = Manifest.read(self.directory / str(number))
        except CorruptCheckpointError as error:
            raise _user_error(str(error)) from error
        print(f"step {manifest.step}, {_size(manifest.size)} in {len(manifest.files)} files, {manifest.created}")
        width = max(map(len, manifest.leaves), default=0)
        for address, leaf in manifest.leaves.items():
            print(f"  {address or '(root)':<{width}}  {leaf!s:<24}  {leaf.sharding}".rstrip())
        print(f"data position: {'none' if manifest.data is None else manifest.data}")
        print(f"meta: {_json.dumps(manifest.meta)}")
        print(f"metrics: {_metrics(manifest.metrics) or 'none'}")
        print("written by: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare every byte of a step with its digests; exit status 1 when something is bad."""

    directory: Path
    """The directory that was given to the manager."""
    step: int | None = None
    """Which step; default the latest."""
    all: bool = False
    """Verify every step."""

    def run(self) -> int:
        """Print a line per step; 1 when one is bad."""
        if self.all and self.step is not None:
            raise _user_error(f"--all and --step {self.step} exclude each other; give one of them")
        numbers = _listed(self.directory) if self.all else [_chosen(self.directory, self.step)]
        return max([self._one(number) for number in numbers], default=0)

    def _one(self, number: int) -> int:
        try:
            manifest = verify(self.directory / str(number), "full")
        except CorruptCheckpointError as error:
            print(f"BAD   {error}")
            return 1
        print(f"good  step {number}: {len(manifest.files)} files, {_size(manifest.size)}")
        return 0


def _listed(directory: Path) -> list[int]:
    if not directory.is_dir():
        raise _user_error(f"{directory} is not a directory; expected the one that was given to the manager")
    numbers = _files.steps(directory)
    if not numbers and not _files.quarantined(directory):
        raise _user_error(f"{directory} holds no steps; expected directories such as {directory / '100'}")
    return numbers


def _chosen(directory: Path, step: int | None) -> int:
    numbers = _listed(directory)
    if step is None and numbers:
        return numbers[-1]
    if step is None or step not in numbers:
        raise _user_error(f"{directory} has no good step {'' if step is None else step}; it has {numbers[-10:]}")
    return step


def _user_error(text: str) -> Exception:
    from dovetail_protocols import CommandError  # imports jax, which only an error is worth

    return CommandError(text)


def _size(n: int) -> str:
    value, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name}={value:.6g}" for name, value in metrics.items())
