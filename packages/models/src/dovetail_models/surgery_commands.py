"""The commands ``models.upcycle``, ``upscale``, ``prune``, ``resize`` and ``merge``: from directory to directory."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dovetail_models.commands import user_errors

if TYPE_CHECKING:
    from dovetail_models.lazy_model import LazyModel

__all__ = ["Merge", "Prune", "Resize", "Upcycle", "Upscale", "Writes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writes:
    """What the commands share: how the result is written."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the floating-point tensors; default their own."""
    max_shard_bytes: int = 5_000_000_000
    """A file is closed before it grows beyond this."""
    overwrite: bool = False
    """Replace an existing directory."""

    def write(self, made: "LazyModel", destination: Path) -> None:
        """Write the result, tensor by tensor, all or nothing, and print what was written."""
        from dovetail_models.description import size
        from dovetail_weights import open_directory

        options: dict[str, Any] = {"max_shard_bytes": self.max_shard_bytes, "overwrite": self.overwrite}
        tensors = open_directory(made.save(destination, dtype=self.dtype, **options))
        stored = size(sum(tensor.nbytes for tensor in tensors.values()))
        print(f"{destination}: {len(tensors)} tensors, {stored} in {len(tensors.files)} files")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Changes(Writes):
    """What commands share that change one model."""

    source: str
    """The directory to read, or a name of the hub such as org/name."""
    destination: Path
    """The directory to make."""
    family: str | None = None
    """Architecture to read out of a larger model, such as T5EncoderModel; default the one that config.json names."""
    revision: str | None = None
    """Branch, tag or commit of the hub."""

    def opened(self) -> "LazyModel":
        """Return the model to change."""
        from dovetail_models.lazy_model import lazy

        return lazy(self.source, family=self.family, revision=self.revision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(_Changes):
    """Write a mixture of experts that begins as a dense model: its MLPs become copies, or slices of copies."""

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

    def run(self) -> None:
        """Write it and print what was written."""
        with user_errors():
            from dovetail_models.upcycling import upcycle

            names = ("experts", "top_k", "granularity", "noise", "seed", "native")
            options: dict[str, Any] = {name: getattr(self, name) for name in names}
            self.write(upcycle(self.opened(), layers=self.layers or None, **options), self.destination)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upscale(_Changes):
    """Write a deeper model whose layers are those of another one, in ranges that may overlap."""

    ranges: tuple[str, ...]
    """Layers of the source in the order of the result: 0:24 8:32 for 0 to 23 and then 8 to 31; 5 for one layer."""
    zero: bool = False
    """Copies of layers add nothing at the beginning, so that the result computes what the source does."""
    at: str | None = None
    """Address of the layers where a model has several lists of them, such as text/layers."""

    def run(self) -> None:
        """Write it and print what was written."""
        with user_errors():
            from dovetail_models.depth import repeat_layers

            order = [index for text in self.ranges for index in _range(text)]
            self.write(repeat_layers(self.opened(), order, zero=self.zero, at=self.at), self.destination)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(_Changes):
    """Write a smaller model: without some layers, and with the heads and hidden features that act most."""

    layers: tuple[int, ...] = ()
    """Indices of the layers that go."""
    kv_heads: int | None = None
    """Key-value heads that stay in each layer, those with the largest output weights; their query heads stay, too."""
    hidden: int | None = None
    """Hidden features that stay in each dense MLP, those with the largest output weights."""
    at: str | None = None
    """Address of the layers where a model has several lists of them, such as text/layers."""

    def run(self) -> None:
        """Write it and print what was written."""
        with user_errors():
            if not self.layers and self.kv_heads is None and self.hidden is None:
                raise ValueError("nothing to prune; pass --layers, --kv-heads or --hidden")
            self.write(self._pruned(self.opened()), self.destination)

    def _pruned(self, model: "LazyModel") -> "LazyModel":
        from dovetail_models import output_norms, prune_heads, prune_hidden, prune_layers, strongest

        if self.layers:
            model = prune_layers(model, self.layers, at=self.at)
        if self.kv_heads is not None:
            scores = output_norms(model, "heads", at=self.at)
            model = prune_heads(model, strongest(scores, self.kv_heads), at=self.at)
        if self.hidden is not None:
            scores = output_norms(model, "hidden", at=self.at)
            model = prune_hidden(model, strongest(scores, self.hidden), at=self.at)
        return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize(_Changes):
    """Write a model with more tokens, whose weights are the mean of the others', or with fewer."""

    size: int
    """Tokens of the result."""
    multiple_of: int = 1
    """The size is rounded up to a multiple of this."""
    spread: float = 0.0
    """New weights are drawn around the mean, with the covariance of the others times this."""
    seed: int = 0
    """Of these draws."""
    shrink: bool = False
    """Allow a smaller size, which drops the last tokens."""

    def run(self) -> None:
        """Write it and print what was written."""
        with user_errors():
            from dovetail_models.vocabulary import resize_vocabulary

            options: dict[str, Any] = {"spread": self.spread, "seed": self.seed, "shrink": self.shrink}
            self.write(
                resize_vocabulary(self.opened(), self.size, multiple_of=self.multiple_of, **options), self.destination
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Writes):
    """Write one model that is made of several of the same sizes."""

    destination: Path
    """The directory to make."""
    sources: tuple[str, ...]
    """The directories to read, or names of the hub; configuration and tokenizer of the first one stay."""
    method: Literal["linear", "slerp", "ties", "dare"] = "linear"
    """How: a weighted average, along a great circle, or what each learned beside a base, thinned out."""
    weights: tuple[float, ...] = ()
    """Of the models; default equal ones."""
    base: str | None = None
    """What the models were before they were trained; ties and dare need it."""
    density: float | None = None
    """Which share of the difference to the base stays, for ties and dare; default 0.2."""
    scale: float | None = None
    """Factor of the merged difference to the base; default 1."""
    seed: int = 0
    """Of what dare keeps."""

    def run(self) -> None:
        """Write it and print what was written."""
        with user_errors():
            from dovetail_models.merging import merge_models

            weights = list(self.weights) or None
            options: dict[str, Any] = {"density": self.density, "scale": self.scale, "seed": self.seed}
            self.write(
                merge_models(self.sources, method=self.method, weights=weights, base=self.base, **options),
                self.destination,
            )


def _range(text: str) -> range:
    start, colon, stop = text.partition(":")
    if not start.isdecimal() or (colon and not stop.isdecimal()):
        raise ValueError(f"ranges: {text!r}; expected two numbers such as 0:24, or one such as 5")
    found = range(int(start), int(stop) if colon else int(start) + 1)
    if not found:
        raise ValueError(f"ranges: {text!r} holds no layer; expected the first one and the one after the last")
    return found
