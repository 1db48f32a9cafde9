"""EngineOptions: the sizes and limits of an engine."""

import dataclasses
from typing import Any

from dovetail_engine.pages import pages_for
from dovetail_engine.runner import Sizes

__all__ = ["EngineOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes and limits; every program is compiled for them before the engine is ready.

    Attributes:
        max_running: requests that run at once; others wait.
        max_length: tokens of a prompt and its reply together.
        chunk_tokens: tokens of prompts per step; longer prompts take several, and running replies grow by one in each.
        decode_steps: tokens per decode and request. More is faster, fewer come in smaller pieces.
        page_size: tokens per page of the cache.
        cache_tokens: tokens that the cache holds; None for ``max_running * max_length``. With fewer the youngest
            request is set back when the cache is full, and computed again.
        cache_dtype: dtype of keys and values; None for that of the parameters.
        keep_experts: the last delta of a reply tells which experts its tokens went to, so that they can be trained with
            the same (`dovetail_kernels.DenseMixer.of`'s `choices`).
    """

    max_running: int = 8
    max_length: int = 1024
    chunk_tokens: int = 256
    decode_steps: int = 8
    page_size: int = 16
    cache_tokens: int | None = None
    cache_dtype: Any = None
    keep_experts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_running", "chunk_tokens", "decode_steps", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}; expected at least 2, a token of prompt and one of reply")
        if self.cache_tokens is not None and self.cache_tokens < self.max_length:
            raise ValueError(f"cache_tokens={self.cache_tokens}; expected at least max_length={self.max_length}")

    def sizes(self) -> Sizes:
        """Return the shapes that follow."""
        pages = pages_for(self.max_length, self.page_size)
        total = self.max_running * pages if self.cache_tokens is None else pages_for(self.cache_tokens, self.page_size)
        return Sizes(
            rows=self.max_running,
            length=pages * self.page_size,
            page=self.page_size,
            pages=total + 1,
            chunk=self.chunk_tokens,
            chunks=min(self.max_running, 8),
            steps=self.decode_steps,
        )
