"""Reply: what one request has been answered so far, as text too, and whether that is all."""

from dovetail_engine.runner import Produced
from dovetail_protocols import Delta, FinishReason, IncrementalDecoder, Request, Tokenizer
from dovetail_text import StopStrings

__all__ = ["Reply"]


class Reply:
    """Turns produced tokens into deltas.

    Args:
        request: what is answered.
        stops: ids that end the reply.
        tokenizer: None for no text.
    """

    def __init__(self, request: Request, stops: frozenset[int], tokenizer: Tokenizer | None) -> None:
        self._sampling = request.sampling
        self._stops = stops
        self._decoder: IncrementalDecoder | None = tokenizer.decoder() if tokenizer is not None else None
        self._matcher = StopStrings(request.sampling.stop) if request.sampling.stop else None
        self._left = request.sampling.max_tokens

    def push(self, produced: Produced, version: int) -> Delta:
        """Return the delta of some new tokens; those after the end of the reply are dropped."""
        text, reason, count = "", None, 0
        for count, token in enumerate(produced.tokens, 1):  # noqa: B007  (count is used after the loop)
            self._left -= 1
            piece, reason = self._step(token)
            text += piece
            if reason is not None:
                break
        logprobs = None if self._sampling.logprobs is None else tuple(produced.logprobs[:count])
        tokens = tuple(produced.tokens[:count])
        return Delta(token_ids=tokens, text=text, logprobs=logprobs, version=version, finish_reason=reason)

    def _step(self, token: int) -> tuple[str, FinishReason | None]:
        if token in self._stops:
            return self._flush(""), "stop"
        piece = self._decoder.push([token]) if self._decoder else ""
        if self._matcher is not None:
            piece = self._matcher.push(piece)
            if self._matcher.matched is not None:
                return piece, "stop"
        if self._left:
            return piece, None
        rest = self._flush(piece)
        return rest, "stop" if self._matcher is not None and self._matcher.matched is not None else "length"

    def _flush(self, piece: str) -> str:
        rest = self._decoder.flush() if self._decoder else ""
        if self._matcher is None:
            return piece + rest
        return piece + self._matcher.push(rest) + self._matcher.flush()
