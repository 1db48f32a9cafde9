"""Engine: generation behind one contract, so that servers, tuning and data recipes need no engine import."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

__all__ = ["Completion", "Delta", "Engine", "FinishReason", "Request", "SamplingParams", "Stream", "TokenLogprob"]

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


def _integer(value: Any) -> bool:
    """Whether it is an integer, Python's or NumPy's; a bool is none."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens.

    Attributes:
        max_tokens: how many tokens at most, at least 1.
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: the smallest set of likeliest tokens with at least this mass, in (0, 1].
        min_p: only tokens at least this fraction as likely as the likeliest, in [0, 1].
        seed: makes a request's tokens a function of itself alone; None draws one.
        stop: strings that end the reply and are not part of it.
        stop_token_ids: ids that end the reply, besides the tokenizer's.
        ignore_eos: go on after the tokenizer's end tokens.
        logprobs: None for no log-probabilities, else how many alternatives per token besides the chosen one.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", _integer(self.max_tokens) and self.max_tokens >= 1, "an integer of at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "finite and not negative"),
            ("top_k", _integer(self.top_k) and self.top_k >= 0, "an integer: 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
            ("seed", self.seed is None or _integer(self.seed), "None or an integer"),
            ("stop_token_ids", all(_integer(token) and token >= 0 for token in self.stop_token_ids), "token ids"),
            ("logprobs", self.logprobs is None or (_integer(self.logprobs) and self.logprobs >= 0), "None, 0 or more"),
        )
        for name, good, expected in checks:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt of at least one token and how to continue it; `id` is the caller's, for logs."""

    prompt: Sequence[int]
    sampling: SamplingParams = SamplingParams()
    id: str = ""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("prompt=[]; expected at least one token id")
        if wrong := [token for token in self.prompt if not _integer(token)]:
            raise ValueError(f"prompt has {wrong[0]!r}; expected token ids")


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of the chosen token, and of the likeliest other ones ``{id: value}``."""

    value: float
    top: Mapping[int, float] = dataclasses.field(default_factory=dict[int, float])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step adds to a reply.

    Attributes:
        token_ids: new tokens, possibly none.
        text: new text, never half a character and never the beginning of a stop string.
        logprobs: one per new token when asked for.
        version: version of the parameters that produced the tokens.
        finish_reason: set on the last delta.
        error: why, when the reason is ``error``.
        experts: on the last delta of an engine that keeps them: int ``[layers, tokens, k]``, which experts the prompt
            and the reply went to, but for the reply's last token, which went nowhere; -1 in layers without. An engine
            that computed a part again, as after a preemption, tells the experts of that computation: rounding may have
            chosen others, of scores that are nearly the same, when the token was sampled.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    version: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    experts: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished reply: the deltas of its stream joined, with one parameter version per token."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    versions: tuple[int, ...] = ()
    error: str | None = None
    experts: Any = None

    @classmethod
    def join(cls, deltas: Sequence[Delta]) -> "Completion":
        """Join the deltas of one stream.

        Raises:
            ValueError: the last delta has no finish reason.
        """
        if not deltas or deltas[-1].finish_reason is None:
            raise ValueError(f"a finished stream ends with a delta that has a finish_reason; got {deltas[-1:]}")
        parts = [d.logprobs for d in deltas if d.logprobs is not None]
        return cls(
            token_ids=tuple(t for d in deltas for t in d.token_ids),
            text="".join(d.text for d in deltas),
            finish_reason=deltas[-1].finish_reason,
            logprobs=tuple(x for part in parts for x in part) if parts else None,
            versions=tuple(d.version for d in deltas for _ in d.token_ids),
            error=deltas[-1].error,
            experts=deltas[-1].experts,
        )


@runtime_checkable
class Stream(Protocol):
    """Iterates over the deltas of one request; closing it cancels the request."""

    def __iter__(self) -> Iterator[Delta]:
        """Return the stream itself."""
        ...

    def __next__(self) -> Delta:
        """Block until the next delta."""
        ...

    def close(self) -> None:
        """Cancel the request if it still runs; the engine frees what it held."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Generates tokens with one model."""

    def submit(self, request: Request, deliver: Callable[[Delta], None] | None = None) -> Stream:
        """Queue a request.

        Without `deliver` the stream is iterated for the deltas. With it every delta goes to ``deliver(delta)``, in
        order and from a thread of the engine's, and the stream is only there to be closed; so an event loop serves
        many streams without a thread for each. `deliver` returns quickly and does not raise. Either way the last
        delta, and no other, has a finish reason; with `deliver` this holds for a closed stream too (``cancelled``).

        Raises:
            ValueError: the request can never run (too long, unknown token id); the message says which limit.
            RuntimeError: the engine is closed.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run requests to their end and return their completions in the same order."""
        ...

    def update_params(self, params: Any, version: int, *, copy: bool = True) -> None:
        """Replace the parameters between two steps.

        With ``copy=False`` the engine borrows them: valid until their owner donates them, after which the engine
        refuses to run until it is updated again.

        Raises:
            ValueError: another tree, shape or dtype, or a version that is not larger than the present one.
        """
        ...

    def stats(self) -> Mapping[str, float]:
        """Return counters and gauges, at least ``waiting``, ``running``, ``tokens_out`` and ``version``.

        An engine may add ``max_length``, the tokens that prompt and reply may have together, and ``ready``, which is 0
        while `submit` would raise a RuntimeError.
        """
        ...

    def pause(self) -> None:
        """Stop between two steps; requests stay queued."""
        ...

    def resume(self) -> None:
        """Go on after `pause`."""
        ...

    def close(self) -> None:
        """Cancel what runs and release everything; a second call does nothing."""
        ...
