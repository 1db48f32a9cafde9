"""``dovetail version``: what is installed and whether it fits together."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator

__all__ = ["Version"]

FOUNDATION = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")


@dataclasses.dataclass(frozen=True)
class Version:
    """Print versions and whether every Dovetail package meets the ranges that the others ask for."""

    def run(self) -> int:
        """Print the table; the status is 1 when something does not fit."""
        print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
        bad = 0
        for name, version, problems in _packages():
            print(f"  {name:24} {version:10} {'ok' if not problems else '; '.join(problems)}")
            bad += bool(problems)
        for name in FOUNDATION:
            print(f"  {name:24} {_version(name) or 'not installed'}")
        return 1 if bad else 0


def _packages() -> Iterator[tuple[str, str, list[str]]]:
    """Yield each installed Dovetail package with the requirements (of its own) that are not met."""
    found = {d.name.lower(): d for d in importlib.metadata.distributions() if d.name.lower().startswith("dovetail")}
    for name, distribution in sorted(found.items()):
        if name != "dovetail-workspace":
            yield name, distribution.version, list(_problems(distribution.requires or []))


def _problems(requirements: list[str]) -> Iterator[str]:
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        present = _version(requirement.name)
        if present is None:
            yield f"{requirement.name} is missing (needs {requirement.specifier})"
        elif not requirement.specifier.contains(present, prereleases=True):
            yield f"{requirement.name} is {present} (needs {requirement.specifier})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
