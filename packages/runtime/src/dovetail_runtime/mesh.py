"""Device meshes by axis name and size; one device gives a mesh of size 1 that changes nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

__all__ = ["mesh"]


def mesh(*, devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """Make a device mesh from axis names and sizes; one size may be -1 and takes the devices that are left.

    The axes are `jax.sharding.AxisType.Auto`: the compiler propagates shardings (``jax.make_mesh`` alone would make
    explicit ones, under which an ordinary matmul of sharded arrays is a type error). No global mesh is set.

    Args:
        devices: the devices to arrange; all of them (``jax.devices()``) by default.
        **axes: sizes by name, outermost first. Without any: one axis ``data`` over all devices.

    Raises:
        ValueError: a size is 0 or below -1, two are -1, or the sizes do not make up the number of devices.
        TypeError: a size is not an int.

    >>> mesh(data=-1, fsdp=2, devices=jax.devices()[:8]).shape["data"]
    4
    """
    chosen = list(jax.devices() if devices is None else devices)
    sizes = _complete(axes or {"data": -1}, len(chosen))
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=chosen)


def _complete(axes: Mapping[str, int], count: int) -> dict[str, int]:
    shown = ", ".join(f"{name}={size}" for name, size in axes.items())
    for name, size in axes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"mesh({shown}): the size of {name!r} is {size!r}; give an int, or -1 for the rest")
        if size == 0 or size < -1:
            raise ValueError(f"mesh({shown}): the size of {name!r} is {size}; give at least 1, or -1 for the rest")
    rest = [name for name, size in axes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"mesh({shown}): the axes {rest} are all -1; only one can take the rest of {count} devices")
    known = math.prod(size for size in axes.values() if size != -1)
    if count % known or (not rest and known != count):
        needs = f"a multiple of {known} devices" if rest else f"{known} devices"
        fix = "change the sizes, set one to -1, or pass devices=jax.devices()[:n]"
        raise ValueError(f"mesh({shown}) needs {needs}, but there are {count}; {fix}")
    return {name: count // known if size == -1 else size for name, size in axes.items()}
