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
    """

    def __init__(self, params: Any) -> None:
        self._params = params
        self._form = _form(params)
        self.version = 0

    def borrow(self) -> Any:
        """Return the parameters.

        Raises:
            Borrowed: their owner has donated them.
        """
        self.check()
        return self._params

    def check(self) -> None:
        """See `borrow`."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._params)):
            raise Borrowed(
                f"the parameters of version {self.version} were borrowed, and their owner has donated them since (to a "
                "training step, say); call update_params with the present ones"
            )

    def update(self, params: Any, version: int, *, copy: bool) -> None:
        """Replace the parameters.

        Raises:
            ValueError: another tree, shape or dtype, or a version that is not larger than the present one.
        """
        if version <= self.version:
            raise ValueError(f"version={version}; expected more than the present {self.version}")
        form = _form(params)
        if form != self._form:
            raise ValueError(f"other parameters than the engine was made with: {_difference(form, self._form)}")
        self._params = jax.tree.map(_copy, params) if copy else params
        self.version = version


def _copy(leaf: jax.Array) -> jax.Array:
    return jax.device_put(leaf, leaf.sharding, may_alias=False)


def _form(params: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _difference(form: dict[str, str], expected: dict[str, str]) -> str:
    for path in form.keys() | expected.keys():
        if form.get(path) != expected.get(path):
            return f"{path} is {form.get(path, 'missing')}; expected {expected.get(path, 'nothing there')}"
    return "the order differs"
