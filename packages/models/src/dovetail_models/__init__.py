"""Model families as plain flax NNX modules on one injected-mixer contract.

Importing this package loads neither jax nor flax, so that its commands can be listed quickly; using a name does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._public import *  # noqa: F403
    from ._public import __all__ as __all__
else:
    import importlib.util

    def __getattr__(name: str) -> Any:
        private = name.startswith("_") and name != "__all__"
        if private or importlib.util.find_spec(f"dovetail_models.{name}"):  # a module is none before it is imported
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("dovetail_models._public"), name)

    def __dir__() -> list[str]:
        return [*globals(), *importlib.import_module("dovetail_models._public").__all__]
