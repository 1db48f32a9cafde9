"""Models on disk: a Hugging Face directory, or a run with its checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import dovetail_models
import dovetail_text
from dovetail.directory import RECORD, RunDirectory
from dovetail.settings import Settings
from dovetail_protocols import CommandError

__all__ = ["Pretrained", "llama_config"]


def llama_config(settings: Settings, vocab_size: int) -> dovetail_models.LlamaConfig:
    """Return the configuration of the model that a run trains."""
    model = settings.model
    return dovetail_models.LlamaConfig(
        vocab_size=vocab_size,
        features=model.features,
        hidden=model.hidden,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        rope_theta=model.rope_theta,
        tied=model.tied,
        max_position=settings.seq_len,
    )


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that can be run.

    Attributes:
        name: what to call it.
        definition: static part.
        params: arrays.
        tokenizer: of its training.
        length: tokens that it was trained to attend to.
    """

    name: str
    definition: Any
    params: Any
    tokenizer: dovetail_text.Tokenizer
    length: int

    @classmethod
    def open(cls, path: Path, *, mapped: bool = False) -> "Pretrained":
        """Open a Hugging Face directory, a run's directory (its newest step), its ``checkpoints``, or one step of them.

        Args:
            path: the directory.
            mapped: leave tensors in the files, see `dovetail_models.from_pretrained`.

        Raises:
            CommandError: there is no model, or a checkpoint is to be mapped.
        """
        if (path / "config.json").exists():
            return cls._exported(path, mapped)
        if mapped:
            raise CommandError(f"{path} holds no config.json; expected a Hugging Face directory, or no --mapped")
        here = path.absolute()
        if (here / RECORD).exists():
            return cls._checkpoint(here, None)
        if here.name == "checkpoints" and (here.parent / RECORD).exists():
            return cls._checkpoint(here.parent, None)
        if here.name.isdecimal() and here.parent.name == "checkpoints" and (here.parent.parent / RECORD).exists():
            return cls._checkpoint(here.parent.parent, int(here.name))
        found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "no directory"
        raise CommandError(
            f"{path} holds no model (found: {found}); expected a directory with config.json and safetensors, or a run "
            f"with {RECORD} and checkpoints"
        )

    @classmethod
    def _exported(cls, path: Path, mapped: bool) -> "Pretrained":
        model = dovetail_models.from_pretrained(path, mapped=mapped)
        tokenizer = dovetail_text.Tokenizer.from_pretrained(path)
        name = path.absolute().name
        return cls(name, *dovetail_models.split(model), tokenizer, model.config.max_position)

    @classmethod
    def _checkpoint(cls, run: Path, step: int | None) -> "Pretrained":
        from dovetail_checkpoint import Manager

        loaded = RunDirectory(run).load()
        assert loaded is not None
        tokenizer = dovetail_text.Tokenizer.from_pretrained(run / "tokenizer")
        config = llama_config(loaded[0], tokenizer.vocab_size)
        definition, shapes = dovetail_models.abstract(lambda: dovetail_models.Llama(config, rngs=nnx.Rngs(0)))
        with Manager(run / "checkpoints") as checkpoints:
            restored = checkpoints.restore(step=step)
        params = _like(shapes, restored.state["params"])
        return cls(f"{run.name}-{restored.step}", definition, params, tokenizer, config.max_position)


def _like(shapes: Any, restored: Any) -> Any:
    """Return the restored arrays in the tree of `shapes` (restored lists are dicts with numbers as text)."""

    def find(path: Any, shape: Any) -> jax.Array:
        value = restored
        for key in path:
            value = value[str(key.key)]
        return jnp.asarray(value, shape.dtype)

    return jax.tree_util.tree_map_with_path(find, shapes)
