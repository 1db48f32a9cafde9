"""Models whose parameters are read when they are needed, of a checkpoint or of another model: what surgery works on.

A surgery takes a model, a directory or a `LazyModel`. A model becomes a model. The others become a `LazyModel`: nothing
of it is read until it is saved tensor by tensor, or built with each device's part alone, and the next surgery can be
applied to it.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dovetail_models.family import Family, family_of
from dovetail_models.hf_directory import open_pretrained
from dovetail_models.hf_files import FURTHER_FILES, files_like
from dovetail_models.layers import without_values
from dovetail_models.lazy_parts import cast, checked
from dovetail_models.stack import Stack, layer_map
from dovetail_models.state import check_no_adapters, merge, nested, placements, split
from dovetail_protocols import QuantizedArray, paths
from dovetail_runtime import Rules
from dovetail_weights import Lazy, Rule, WeightMap, check, load, save

__all__ = ["LazyModel", "lazy", "surgery"]

P = ParamSpec("P")

SAME = WeightMap([Rule(a, a) for a in ("/".join(f"{{{part}}}" for part in "abcdefgh"[:n]) for n in range(1, 9))])
"""Every address stays as it is; none has more than 8 parts."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, eq=False)
class LazyModel:
    """A model whose parameters are read when they are needed.

    Attributes:
        family: its kind.
        config: sizes and options.
        tensors: its parameters by address, with those of layers one by one: ``layers/3/mlp/up``.
        token_ids: of ``config.json``.
        files: that go beside the weights, such as the tokenizer's, by name.
    """

    family: Family
    config: Any
    tensors: Mapping[str, Lazy]
    token_ids: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of most parameters' elements."""
        sizes = Counter[np.dtype[Any]]()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes // tensor.dtype.itemsize
        return max(sizes, key=sizes.__getitem__)

    def module(self, **options: Any) -> Any:
        """Return the model without values; `options` are those of `from_pretrained`."""
        return without_values(self.family.model, self.config, **options)

    def build(
        self,
        *,
        param_dtype: Any = jnp.float32,
        dtype: Any = None,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        **options: Any,
    ) -> Any:
        """Return the model; for the arguments see `from_pretrained`, but for `param_dtype`: None for the tensors' own.

        Raises:
            dovetail_weights.WeightsError: the parameters are not those of the configuration.
            ValueError: only one of `mesh` and `rules` is given.
        """
        if (mesh is None) != (rules is None):
            raise ValueError(f"mesh={mesh}, rules={rules}; expected both or neither")
        kind = self.dtype if param_dtype is None else param_dtype
        definition, like = split(module := self.module(param_dtype=kind, dtype=dtype, **options))
        places = None if mesh is None or rules is None else placements(module, mesh, rules)
        table = layer_map(SAME, self.family.stacks(self.config))
        if param_dtype is None:
            like = self._own_dtypes(like, table)
        return merge(definition, load(self.tensors, table, like, shardings=places))

    def _own_dtypes(self, like: Any, table: WeightMap) -> Any:
        """Return the same tree with the dtypes of the tensors; layers that are stacked have that of the first one."""
        found: dict[str, Any] = {}
        for group in table.groups(leaves := paths.flatten(like)):
            known = [self.tensors[name].dtype for name in group.names if name in self.tensors]
            for address in group.addresses if known else ():
                found[address] = jax.ShapeDtypeStruct(leaves[address].shape, known[0])
        return paths.update(like, found)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        max_shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
    ) -> Path:
        """Write a Hugging Face directory, tensor by tensor, and return its path; all or nothing.

        Args:
            path: the directory to make.
            dtype: of the floating-point tensors; None for their own.
            max_shard_bytes: see `dovetail_weights.write_directory`.
            overwrite: replace an existing directory.

        Raises:
            FileExistsError: `path` exists and `overwrite` is not set.
            ConfigError: ``config.json`` cannot say what the model is.
            dovetail_weights.WeightsError: the parameters are not those of the configuration, or too large for `dtype`.
        """
        check(self.tensors, SAME, split(self.module(param_dtype=self.dtype))[1])
        kind = str(np.dtype(self.dtype if dtype is None else dtype))
        values = self.family.config_map.write(self.config, dtype=kind, token_ids=self.token_ids)
        files: dict[str, bytes] = {"generation_config.json": _json(dict(self.token_ids)), **self.files}
        files["config.json"] = _json(values)
        options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "overwrite": overwrite}
        table = self.family.weight_map(self.config)
        tensors = {address: cast(address, tensor, dtype) for address, tensor in self.tensors.items()}
        return save(Path(path), table, nested(tensors), extra_files=files, **options)


def lazy(model: Any, *, family: Family | str | None = None, revision: str | None = None) -> LazyModel:
    """Return a model, or that of a Hugging Face directory, as one whose parameters are read when they are needed.

    Args:
        model: of this package, with plain parameters; or a directory, or a name of the hub, see `from_pretrained`.
        family: how to read a directory; or the `Family` of a model that is none of this package's.
        revision: of the hub.

    Raises:
        ConfigError: the configuration is malformed or describes another model.
        dovetail_weights.WeightsError: tensors are missing, unexpected, of another shape, or damaged.
        FileNotFoundError: there is no such directory or file.
        TypeError: it is no model.
        ValueError: its parameters are quantized or adapted, or arguments are given that are for directories.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2)
    >>> lazy(Llama(config, rngs=nnx.Rngs(0))).tensors["layers/0/mlp/up"].shape
    (8, 16)
    """
    if isinstance(model, str | os.PathLike):
        return _of_directory(model, family, revision)
    if revision is not None or isinstance(family, str) or (family and isinstance(model, LazyModel)):
        raise ValueError(f"family={family!r}, revision={revision!r} for a {type(model).__name__}; expected a directory")
    return model if isinstance(model, LazyModel) else _of_module(model, family or family_of(model))


def _of_directory(path: str | os.PathLike[str], family: Family | str | None, revision: str | None) -> LazyModel:
    opened = open_pretrained(path, family, revision)
    opened.check()
    _, like = split(opened.module())
    tensors: dict[str, Lazy] = {}
    for group in opened.table(like).groups(paths.flatten(like)):
        made = group.to_ours([opened.tensors[name] for name in group.names])
        tensors |= zip(group.addresses, made, strict=True)
    ids = {name: opened.values[name] for name in TOKEN_IDS if opened.values.get(name) is not None}
    return LazyModel(opened.family, opened.config, tensors, ids, files_like(opened.path, FURTHER_FILES))


def _of_module(model: Any, family: Family) -> LazyModel:
    check_no_adapters(model)
    _, params = split(model)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedArray))
    if any(isinstance(leaf, QuantizedArray) for leaf in leaves):
        raise ValueError(f"{type(model).__name__} has quantized parameters; expected the model before it was quantized")
    flat = {address: _of_array(leaf) for address, leaf in paths.flatten(params).items()}
    tensors: dict[str, Lazy] = {}
    for group in layer_map(SAME, family.stacks(model.config)).groups(flat):
        tensors |= zip(group.names, group.to_theirs([flat[address] for address in group.addresses]), strict=True)
    return LazyModel(family, model.config, tensors)


def _of_array(leaf: Any) -> Lazy:
    return Lazy(tuple(leaf.shape), np.dtype(leaf.dtype), lambda index: np.asarray(leaf[index]))


def surgery(operate: Callable[Concatenate[LazyModel, P], LazyModel]) -> Callable[Concatenate[Any, P], Any]:
    """Make a function of a `LazyModel` one of models, too: of one in memory it makes another, with the same options.

    What it makes is seen to be finite where it is read: a `dovetail_weights.WeightsError` names the parameter that is
    not.
    """

    @functools.wraps(operate)
    def call(model: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        given = lazy(model)
        options = _options(model) if isinstance(model, nnx.Module) else None
        made = operate(given, *args, **kwargs)
        made = replace(made, tensors={address: checked(address, tensor) for address, tensor in made.tensors.items()})
        return made if options is None else made.build(**options)

    return call


def _options(model: Any) -> dict[str, Any]:
    """Return the arguments that a model was made with."""
    devices = {device for leaf in jax.tree.leaves(split(model)[1]) for device in leaf.devices()}
    if len(devices) > 1:
        raise ValueError(
            f"the parameters are on {len(devices)} devices; operate on lazy(model), and build(mesh=..., rules=...) that"
        )
    inner = getattr(model, "text", model)  # a model with a decoder inside hands these on
    options: dict[str, Any] = {"param_dtype": None, "dtype": model.dtype}
    for name in ("output_dtype", "remat"):
        found = getattr(model, name, getattr(inner, name, None))
        options |= {} if found is None else {name: found}
    scanned = any(isinstance(node, Stack) for _, node in nnx.iter_graph(model))
    return options | ({"scan": True} if scanned else {})


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
