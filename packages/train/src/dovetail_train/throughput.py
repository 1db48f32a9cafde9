"""Rates from wall times."""

import dataclasses

__all__ = ["Throughput"]


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What one step amounts to, and what the machine could do.

    Attributes:
        tokens: tokens per step, over all processes; None to report none.
        flops: floating-point operations in the matrix products of a step (`Trainer.flops`).
        peak: operations per second of all devices together (`dovetail_profile.peak_flops` knows one device).
    """

    tokens: int | None = None
    flops: int | None = None
    peak: float | None = None

    def rates(self, seconds: float) -> dict[str, float]:
        """Return ``step_seconds`` and, as far as known, ``tokens_per_second`` and ``mfu`` (fraction of the peak)."""
        out = {"step_seconds": seconds}
        if self.tokens is not None:
            out["tokens_per_second"] = self.tokens / seconds
        if self.flops is not None and self.peak is not None:
            out["mfu"] = self.flops / seconds / self.peak
        return out
