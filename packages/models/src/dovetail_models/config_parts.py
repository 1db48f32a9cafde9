"""Parts of some families' configurations: windows, and heads of which rotary embeddings turn a share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dovetail_models.decoder import DecoderConfig
from dovetail_models.layers import Rotary

__all__ = ["LayerWindowsConfig", "PartlyTurnedConfig", "WindowConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig(DecoderConfig):
    """A window of the same width in every layer.

    Attributes:
        window: how many last tokens a token sees, in every layer; None for all.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}; expected at least 1, or None for all tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWindowsConfig(DecoderConfig):
    """Windows in some layers.

    Attributes:
        windows: how many last tokens a token sees, per layer, None for all of them; None for no window anywhere.
    """

    windows: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows is None:
            return
        if len(self.windows) != self.layers:
            raise ValueError(f"windows={self.windows}; expected one for each of {self.layers} layers, or None")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows={self.windows}; expected numbers of at least 1, or None for all tokens")

    def rearranged(self, order: Sequence[int]) -> dict[str, Any]:
        """See `StackConfig.rearranged`."""
        windows = None if self.windows is None else tuple(self.windows[i] for i in order)
        return {**super().rearranged(order), "windows": windows}

    def window_of(self, index: int) -> int | None:
        """Return the window of a layer; None for none."""
        return None if self.windows is None else self.windows[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartlyTurnedConfig(DecoderConfig):
    """Heads of which rotary embeddings turn the first features only.

    Attributes:
        rotary_fraction: which share of a head's features rotary embeddings turn.
    """

    rotary_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction={self.rotary_fraction}; expected above 0 and at most 1")
        super().__post_init__()

    def rotary(self) -> Rotary:
        """See `DecoderConfig.rotary`."""
        return Rotary(int(self.dim * self.rotary_fraction), self.rope_theta, self.rope_scaling)
