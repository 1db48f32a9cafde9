"""The commands of models that change no weights but their form; each imports what it needs when it runs."""

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

__all__ = ["Convert", "Describe", "List"]


@dataclasses.dataclass(frozen=True)
class List:
    """List the families of models with the architectures that config.json names."""

    def run(self) -> None:
        """Print a line per architecture."""
        from dovetail_models.family import FAMILIES, architecture_family

        rows = [(architecture_family(name).model.__name__, name) for name in FAMILIES]
        width = max(len(model) for model, _ in rows)
        for model, architecture in sorted(rows):
            print(f"{model:<{width}}  {architecture}")


@dataclasses.dataclass(frozen=True)
class Describe:
    """Describe a Hugging Face directory: sizes, parameters by group, memory, operations; its headers are checked."""

    path: str
    """The directory (one that holds config.json alone will do), or a name of the hub such as org/name."""
    family: str | None = None
    """Architecture to read out of a larger model, such as T5EncoderModel; default the one that config.json names."""
    revision: str | None = None
    """Branch, tag or commit of the hub."""
    time: int | None = None
    """Tokens of the row that the forward is counted for; default the longest, but at most 2048."""

    def run(self) -> None:
        """Print it."""
        with user_errors():
            from dovetail_models import describe
            from dovetail_models.description import size
            from dovetail_models.hf_directory import chosen_family, noted_dtype, open_pretrained, read_config
            from dovetail_models.hub import located

            folder = located(self.path, self.revision)
            if not any(folder.glob("*.safetensors*")):
                values = read_config(folder / "config.json")
                config = chosen_family(values, self.family).config_map.read(values)
                print(describe(config, time=self.time, param_dtype=noted_dtype(values)))
                return
            opened = open_pretrained(folder, self.family)
            names = opened.check().values()
            dtypes = sorted({str(opened.tensors[name].dtype) for name in names})
            print(describe(opened.module(param_dtype=dtypes[0] if len(dtypes) == 1 else "float32"), time=self.time))
            stored = size(sum(opened.tensors[name].nbytes for name in names))
            print(f"stored: {len(names)} tensors of {', '.join(dtypes)}, {stored} in {len(opened.tensors.files)} files")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a Hugging Face directory with another dtype or other shards, tensor by tensor, all or nothing."""

    source: str
    """The directory to read, or a name of the hub such as org/name."""
    destination: Path
    """The directory to make."""
    family: str | None = None
    """Architecture to read out of a larger model, such as T5EncoderModel; default the one that config.json names."""
    revision: str | None = None
    """Branch, tag or commit of the hub."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the floating-point tensors; default their own."""
    max_shard_bytes: int = 5_000_000_000
    """A file is closed before it grows beyond this."""
    overwrite: bool = False
    """Replace an existing directory."""

    def run(self) -> None:
        """Write it and print what was written."""
        with user_errors():
            from dovetail_models import convert
            from dovetail_models.description import size
            from dovetail_weights import open_directory

            made = convert(
                self.source,
                self.destination,
                family=self.family,
                revision=self.revision,
                dtype=self.dtype,
                max_shard_bytes=self.max_shard_bytes,
                overwrite=self.overwrite,
            )
            tensors = open_directory(made)
            stored = size(sum(tensor.nbytes for tensor in tensors.values()))
            print(f"{self.destination}: {len(tensors)} tensors, {stored} in {len(tensors.files)} files")


@contextmanager
def user_errors() -> Generator[None]:
    """Turn what a wrong path or a damaged directory raises into an error that the command line prints."""
    try:
        yield
    except (OSError, ValueError) as error:
        from dovetail_protocols import CommandError

        raise CommandError(str(error)) from error
