"""The command ``models.upcycle``."""

import dataclasses
from pathlib import Path

from dovetail_models.commands import user_errors

__all__ = ["Upcycle"]


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Make a mixture of experts of a dense model: copies or slices of its MLPs; tensor by tensor, all or nothing."""

    source: str
    """The directory to read, or a name of the hub such as org/name."""
    destination: Path
    """The directory to make."""
    experts: int = 8
    """How many experts a layer has."""
    top_k: int = 2
    """How many experts a token chooses."""
    granularity: int = 1
    """Slices of a copy, each an expert; where it divides top_k the model computes what it did."""
    layers: tuple[int, ...] = ()
    """Layers that get experts; default all."""
    noise: float = 0.0
    """Standard deviation of what is added to the experts' weights, relative to theirs."""
    seed: int = 0
    """Of the noise and of the routers."""
    native: bool = True
    """Become a family that transformers knows, where there is one; else the directory is for dovetail alone."""
    max_shard_bytes: int = 5_000_000_000
    """A file is closed before it grows beyond this."""
    overwrite: bool = False
    """Replace an existing directory."""

    def run(self) -> None:
        """Write it and print what was written."""
        with user_errors():
            from dovetail_models import describe, upcycle

            made = upcycle(
                self.source,
                experts=self.experts,
                top_k=self.top_k,
                granularity=self.granularity,
                layers=self.layers or None,
                noise=self.noise,
                seed=self.seed,
                native=self.native,
            )
            made.save(self.destination, max_shard_bytes=self.max_shard_bytes, overwrite=self.overwrite)
            count = describe(made.module()).parameters
            print(f"{self.destination}: {made.family.config_map.architecture}, {count:,} parameters")
