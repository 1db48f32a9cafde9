"""`ServeOptions`: the limits of a server."""

import dataclasses
import re

__all__ = ["ServeOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Limits and defaults of a server.

    Attributes:
        max_queue: how many replies may be in flight (waiting or running); what is above is answered with 503. A request
            counts once for each of its prompts and choices.
        max_body_bytes: the longest request body; longer ones are answered with 413.
        drain_seconds: how long a server that was told to stop goes on with what it has accepted.
        read_seconds: how long a client may take to send a body; then 408.
        write_seconds: how long a client may read nothing of a reply; then its request is cancelled.
        completion_tokens: ``max_tokens`` of a completion that names none; 16 as in the OpenAI API.
        chat_tokens: the same of a chat completion, less where `context_length` leaves less.
        context_length: how many tokens prompt and reply may have together; None for the ``max_length`` of
            the engine's stats, or no limit of the server's where it has none.
        prompt_prefix: ids put before the text prompts of completions, such as a begin token; chat templates and prompts
            given as ids have their own.
        metrics_prefix: what the names of metrics begin with.

    Raises:
        ValueError: a limit that no server can keep.
    """

    max_queue: int = 256
    max_body_bytes: int = 4 << 20
    drain_seconds: float = 30.0
    read_seconds: float = 30.0
    write_seconds: float = 60.0
    completion_tokens: int = 16
    chat_tokens: int = 1024
    context_length: int | None = None
    prompt_prefix: tuple[int, ...] = ()
    metrics_prefix: str = "dovetail_"

    def __post_init__(self) -> None:
        checks = (
            ("max_queue", self.max_queue >= 1, "at least 1"),
            ("max_body_bytes", self.max_body_bytes >= 1, "at least 1"),
            ("drain_seconds", 0 <= self.drain_seconds < float("inf"), "0 or more and finite"),
            ("read_seconds", 0 < self.read_seconds < float("inf"), "more than 0 and finite"),
            ("write_seconds", 0 < self.write_seconds < float("inf"), "more than 0 and finite"),
            ("completion_tokens", self.completion_tokens >= 1, "at least 1"),
            ("chat_tokens", self.chat_tokens >= 1, "at least 1"),
            ("context_length", self.context_length is None or self.context_length >= 2, "None, or at least 2"),
            ("prompt_prefix", all(i >= 0 for i in self.prompt_prefix), "token ids"),
            ("metrics_prefix", re.fullmatch("([a-zA-Z_:][a-zA-Z0-9_:]*)?", self.metrics_prefix), "a prefix of a name"),
        )
        for name, good, expected in checks:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected {expected}")
