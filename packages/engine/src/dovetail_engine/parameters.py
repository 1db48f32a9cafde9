"""Parameters: the ones in use, their version, and whether their owner has taken them back."""

from typing import Any

import jax

__all__ = ["Borrowed", "Parameters"]


class Borrowed(RuntimeError):
    """The borrowed parameters were donated by their owner."""


class Parameters:
    """A tree of arrays with a version.

    Args:
        params: borrowed; version 0.

    Raises:
        ValueError: a leaf is no jax array.
    """

    def __init__(self, params: Any) -> None:
        self._form, self._structure = _form(params), jax.tree.structure(params)
        self._params = params
        self._places = jax.tree.map(lambda leaf: leaf.format, params)
        self.version = 0

    def borrow(self) -> Any:
        """Return the parameters.

        Raises:
            Borrowed: their owner has donated them.
        """
        self.check()
        return self._params

    @property
    def donated(self) -> bool:
        """Whether their owner has taken them back."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self._params))

    def check(self) -> None:
        """See `borrow`."""
        if self.donated:
            raise Borrowed(
                f"the parameters of version {self.version} were borrowed, and their owner has donated them since (to a "
                "training step, say); call update_params with the present ones"
            )

    def _check_places(self, params: Any) -> None:
        for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(self._places), strict=True):
            if not leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim):
                raise ValueError(
                    f"borrowed parameters are on the devices {_devices(leaf.sharding)}; expected "
                    f"{_devices(place.sharding)}, placed as the engine was compiled for (copy=True moves them)"
                )
            if leaf.format.layout != place.layout:
                raise ValueError(
                    f"borrowed parameters have the order of axes {leaf.format.layout.major_to_minor}; expected "
                    f"{place.layout.major_to_minor}, that of the mapped files that the engine was compiled for "
                    "(copy=True changes it)"
                )

    def update(self, params: Any, version: int, *, copy: bool) -> None:
        """Replace the parameters.

        Raises:
            ValueError: another tree, shape, dtype or (borrowed) place, or a version that is not larger than the
                present one.
        """
        if version <= self.version:
            raise ValueError(f"version={version}; expected more than the present {self.version}")
        form, structure = _form(params), jax.tree.structure(params)
        if form != self._form:
            raise ValueError(f"other parameters than the engine was made with: {_difference(form, self._form)}")
        if structure != self._structure:
            raise ValueError(f"the parameters have the structure {structure}; expected {self._structure}")
        if not copy:
            self._check_places(params)
        self._params = jax.tree.map(_copy, params, self._places) if copy else params
        self.version = version


def _copy(leaf: jax.Array, place: Any) -> jax.Array:
    moved = jax.device_put(leaf, place.sharding, may_alias=False)
    return moved if moved.format.layout == place.layout else jax.device_put(moved, place)


def _devices(place: Any) -> list[int]:
    return sorted(device.id for device in place.device_set)


def _form(params: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in leaves:
        if not isinstance(leaf, jax.Array):
            kind = type(leaf).__name__
            raise ValueError(f"{jax.tree_util.keystr(path)} is {kind}; expected a jax array (jax.device_put makes one)")
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _difference(form: dict[str, str], expected: dict[str, str]) -> str:
    for path in form.keys() | expected.keys():
        if form.get(path) != expected.get(path):
            return f"{path} is {form.get(path, 'missing')}; expected {expected.get(path, 'nothing there')}"
    return "the order differs"
