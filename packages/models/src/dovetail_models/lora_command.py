"""The command ``models.lora``; it imports what it needs when it runs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail_models.commands import user_errors
from dovetail_models.surgery_commands import Writes

if TYPE_CHECKING:
    from dovetail_models.adapter import Adapter

__all__ = ["LoraCommand"]


@dataclasses.dataclass(frozen=True)
class LoraCommand(Writes):
    """Show an adapter of peft and what it changes in a model, or write the model with it merged; all or nothing."""

    adapter: str
    """The directory of the adapter: adapter_config.json and adapter_model.safetensors."""
    base: str
    """The directory of the model, or a name of the hub such as org/name."""
    merged: Path | None = None
    """The directory to make, with the adapter added to the weights, tensor by tensor; default none."""
    family: str | None = None
    """Architecture to read out of a larger model, such as T5EncoderModel; default the one that config.json names."""
    revision: str | None = None
    """Branch, tag or commit of the hub."""

    def run(self) -> None:
        """Print what the adapter is, and write what was asked for."""
        with user_errors():
            self._check_used()
            from dovetail_models import lazy, load_lora, merge_lora

            base = lazy(self.base, family=self.family, revision=self.revision)
            adapter = load_lora(self.adapter, base)
            print("\n".join(described(adapter)))
            if self.merged is not None:
                self.write(merge_lora(base, adapter), self.merged)

    def _check_used(self) -> None:
        pairs = [(field, getattr(self, field.name)) for field in dataclasses.fields(Writes)]
        given = [f"--{field.name.replace('_', '-')}={value}" for field, value in pairs if value != field.default]
        if self.merged is None and given:
            raise ValueError(
                f"{', '.join(given)}: how a merged model is written; expected --merged, the directory to make, too"
            )


def described(adapter: "Adapter") -> list[str]:
    """Return a line for each kind of weight that an adapter changes, layers taken together, and the sum."""
    import jax

    from dovetail_models.adapter import flat_adapter
    from dovetail_models.description import size

    kinds: dict[tuple[Any, ...], list[int]] = {}
    for address, part in flat_adapter(adapter).items():
        name = "/".join("*" if piece.isdigit() else piece for piece in address.split("/"))
        kind = "DoRA" if part.magnitude is not None else "LoRA"
        found = kinds.setdefault((name, kind, part.rank, f"{part.scale:.4g}"), [])
        found.append(sum(x.size for x in jax.tree.leaves(part)))
    width = max(len(name) for name, *_ in kinds)
    lines = [
        f"{name:<{width}}  {kind} of rank {rank}, scale {scale}: {len(counts)} with {sum(counts):,} numbers"
        for (name, kind, rank, scale), counts in kinds.items()
    ]
    leaves = jax.tree.leaves(adapter)
    held = size(sum(x.nbytes for x in leaves))
    return [*lines, f"{sum(x.size for x in leaves):,} numbers, {held}"]
