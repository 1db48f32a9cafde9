"""What a model is made of and what it costs: parameters by group, memory, operations of a forward."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from dovetail_kernels import DenseMixer
from dovetail_models.family import family_of
from dovetail_models.layers import without_values
from dovetail_models.state import merge, split
from dovetail_protocols import (
    CacheSpec,
    FullCache,
    LatentCache,
    LowRankArray,
    QuantizedArray,
    RecurrentCache,
    WindowCache,
    paths,
)

if TYPE_CHECKING:
    from dovetail_profile import Cost

__all__ = ["Description", "ParameterGroup", "describe"]

MAX_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one kind in all layers: how many numbers, and their bytes."""

    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model is made of and what it costs.

    Attributes:
        config: sizes and options.
        groups: the parameters by address, layers taken together: ``layers/*/attention``.
        time: tokens of the row that `forward` is counted for.
        forward: of one row of text, logits included; see `dovetail_profile.cost`.
        cache_bytes_per_token: what the caches of all layers grow by with every token of a row.
        cache_bytes_at_most: what the others, of windows and recurrent states, need per row however long it is.
        image: of an image on its way into a text, besides; None where there are none.
    """

    config: Any
    groups: Mapping[str, ParameterGroup]
    time: int
    forward: "Cost"
    cache_bytes_per_token: int
    cache_bytes_at_most: int
    image: "Cost | None" = None

    @property
    def parameters(self) -> int:
        """How many numbers the model learns; a quantized one counts once, adapters count beside their bases."""
        return sum(group.parameters for group in self.groups.values())

    @property
    def bytes(self) -> int:
        """Memory of all parameters."""
        return sum(group.bytes for group in self.groups.values())

    @property
    def flops_per_token(self) -> float:
        """Operations of a forward per token, in rows of `time` tokens."""
        return self.forward.flops / self.time

    def __str__(self) -> str:
        """Return it as text for a terminal."""
        width = max(map(len, self.groups))
        rows = [f"  {name:<{width}}  {g.parameters:>16,}  {size(g.bytes):>9}" for name, g in self.groups.items()]
        fields = [f"  {f.name}: {getattr(self.config, f.name)}" for f in dataclasses.fields(self.config)]
        image = self.image
        images = [f"an image: {image.flops:.4g} flops; {size(image.io_bytes)} in and out"] if image else []
        return "\n".join(
            [
                type(self.config).__name__,
                *fields,
                f"parameters: {self.parameters:,}, {size(self.bytes)}",
                *rows,
                f"forward of a row of {self.time} tokens: {self.forward.flops:.4g} flops, "
                f"{self.flops_per_token:.4g} per token; {size(self.forward.io_bytes)} in and out",
                *images,
                f"cache: {size(self.cache_bytes_per_token)} per token, and at most {size(self.cache_bytes_at_most)} "
                "per row for windows and states",
            ]
        )


def describe(model: Any, *, time: int | None = None, param_dtype: Any = jnp.float32) -> Description:
    """Describe a model, or the one that a configuration makes; nothing is computed or allocated.

    Args:
        model: a model, abstract (``nnx.eval_shape(build)``) or not, or a configuration of this package's families.
        time: tokens of the row that the forward is counted for; None for the longest that the model is meant for, but
            at most 2048.
        param_dtype: dtype of the parameters, where a configuration is given.

    Raises:
        TypeError: a configuration is of none of this package's families.
        ValueError: `time` is below 1, or the model has more than 10000 layers.

    >>> from dovetail_models import LlamaConfig
    >>> config = LlamaConfig(vocab_size=1000, features=64, hidden=160, layers=2, heads=4, tied=True)
    >>> found = describe(config, time=128)
    >>> found.parameters, found.cache_bytes_per_token
    (158528, 1024)
    """
    config = getattr(model, "config", model)
    if config.layers > MAX_LAYERS:
        raise ValueError(f"layers={config.layers}; a description traces every layer, so expected at most {MAX_LAYERS}")
    length: int = min(config.max_position, 2048) if time is None else time
    if length < 1:
        raise ValueError(f"time={time}; expected at least 1")
    given = isinstance(model, nnx.Module)
    module: Any = model if given else without_values(family_of(config).model, config, param_dtype=param_dtype)
    specs = module.cache_specs() if hasattr(module, "cache_specs") else ()
    growing, fixed = (sum(_bytes(spec, module.dtype.itemsize, one) for spec in specs) for one in (True, False))
    image = _image(module) if hasattr(module, "embed_images") else None
    return Description(config, _groups(split(module)[1]), length, _forward(module, length), growing, fixed, image)


def _groups(params: Any) -> dict[str, ParameterGroup]:
    found: dict[str, ParameterGroup] = {}
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_weight)
    for path, leaf in leaves:
        parts = ["*" if part.isdigit() else part for part in paths.path_of(path).split("/")]
        name = "/".join(parts[:-1] or parts)
        have = found.get(name, ParameterGroup(0, 0))
        held = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(leaf))
        parts = jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, QuantizedArray))
        found[name] = ParameterGroup(have.parameters + sum(math.prod(x.shape) for x in parts), have.bytes + held)
    return found


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray | LowRankArray)


def _abstracted(model: Any) -> tuple[Any, Any]:
    """Return a model's definition and the shapes of its parameters."""
    definition, params = split(model)
    return definition, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def _image(model: Any) -> "Cost":
    from dovetail_profile import cost

    definition, shapes = _abstracted(model)
    pixels = model.vision.patches.example()
    return cost(lambda params, pixels: merge(definition, params).embed_images(pixels), shapes, pixels)


def _forward(model: Any, time: int) -> "Cost":
    from dovetail_profile import cost

    definition, shapes = _abstracted(model)
    if not hasattr(model, "cache_specs"):
        return cost(lambda params, *inputs: merge(definition, params)(*inputs), shapes, *model.example(time))

    def run(params: Any, tokens: jax.Array) -> Any:
        built = merge(definition, params)
        positions = jnp.arange(time, dtype=jnp.int32)
        hidden, aux, _ = built.hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
        return built.unembed(hidden), aux

    return cost(run, shapes, jax.ShapeDtypeStruct((1, time), jnp.int32))


def _bytes(spec: CacheSpec, itemsize: int, growing: bool) -> int:
    """Return what a layer keeps per token, or at most per row."""
    match spec:
        case FullCache(kv_heads, key_dim, value_dim):
            return kv_heads * (key_dim + value_dim) * itemsize if growing else 0
        case LatentCache(latent_dim, rope_dim):
            return (latent_dim + rope_dim) * itemsize if growing else 0
        case WindowCache(kv_heads, key_dim, value_dim, window):
            return 0 if growing else window * kv_heads * (key_dim + value_dim) * itemsize
        case RecurrentCache(state):
            return 0 if growing else 4 * sum(math.prod(shape) for _, shape in state)  # always float32


def size(n: int) -> str:
    """Return bytes as text."""
    value, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
