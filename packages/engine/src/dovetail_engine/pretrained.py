"""From a directory of weights to a running engine."""

import functools
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dovetail_engine.engine import Engine
from dovetail_engine.options import EngineOptions

__all__ = ["load_engine"]


def load_engine(
    path: str | os.PathLike[str],
    *,
    options: EngineOptions | None = None,
    dtype: Any = jnp.float32,
    mapped: bool = False,
) -> Engine:
    """Return an engine for a directory in Hugging Face's format, with its tokenizer.

    Args:
        path: holds ``config.json``, safetensors and ``tokenizer.json``.
        options: None for the defaults, with the model's own context length as `max_length` where that is smaller.
        dtype: of the parameters and the computation.
        mapped: on a CPU, leave tensors of this dtype in the files, see `dovetail_weights.load`: engines of one
            directory share their memory.

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    from dovetail_models import from_pretrained, merge, split
    from dovetail_text import Tokenizer

    model = from_pretrained(path, param_dtype=dtype, mapped=mapped)
    tokenizer = Tokenizer.from_pretrained(Path(path))
    definition, params = split(model)
    if options is None:
        options = EngineOptions()
        options = EngineOptions(max_length=min(options.max_length, model.config.max_position))
    return Engine(functools.partial(merge, definition), params, tokenizer=tokenizer, options=options)
