"""`Call`: a request that was understood, and the tokens that it means."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dovetail_protocols import Message, SamplingParams, Tokenizer
from dovetail_serve import checks
from dovetail_serve.errors import ApiError
from dovetail_serve.fields import CHAT, COMPLETION, LARGEST, parse
from dovetail_serve.options import ServeOptions

__all__ = ["Call", "Prompt", "encode", "read_chat", "read_completion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a client asks for.

    Attributes:
        model: the model's name.
        prompts: texts, id tuples or None (an empty document) of a completion.
        messages: the conversation of a chat completion, else empty.
        n: replies per prompt.
        seed: the seed of the first reply; reply i has ``seed + i``.
        max_tokens: the limit that the client set.
        logprobs: None, or how many alternatives per token.
        stream: whether to answer with server-sent events.
        include_usage: whether a stream ends with the usage.
        echo: whether a reply begins with the prompt.
        user: who asks; part of the engine's request id.
        sampling: the sampling fields as `SamplingParams` has them.
    """

    model: str
    prompts: Sequence[Any] = ()
    messages: Sequence[Message] = ()
    n: int
    seed: int | None
    max_tokens: int | None
    logprobs: int | None
    stream: bool
    include_usage: bool
    echo: bool = False
    user: str | None
    sampling: dict[str, Any]

    @property
    def replies(self) -> int:
        """How many replies the engine has to make."""
        return self.n * max(1, len(self.prompts))

    def params(self, prompt_tokens: int, choice: int, options: ServeOptions) -> SamplingParams:
        """Return the sampling parameters of one choice of a prompt with so many tokens."""
        seed = None if self.seed is None else self.seed + choice
        length = self.max_tokens or self._length(prompt_tokens, options)
        return SamplingParams(max_tokens=length, seed=seed, logprobs=self.logprobs, **self.sampling)

    def _length(self, prompt_tokens: int, options: ServeOptions) -> int:
        if not self.messages:
            return options.completion_tokens
        limit = options.context_length
        return options.chat_tokens if limit is None else max(1, min(options.chat_tokens, limit - prompt_tokens))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and its text where the reply echoes it."""

    ids: Sequence[int]
    text: str = ""


def read_completion(body: bytes) -> Call:
    """Read the body of a completion request.

    Raises:
        ApiError: 400, naming the field.
    """
    values = parse(body, COMPLETION)
    if values["echo"] and values["logprobs"] is not None:
        message = "echo=true with logprobs is not supported: prompts have no log-probabilities; leave one of them out"
        raise ApiError(400, message, param="echo", code="unsupported_parameter")
    return Call(prompts=values["prompt"], logprobs=values["logprobs"], echo=values["echo"], **_shared(values))


def read_chat(body: bytes) -> Call:
    """Read the body of a chat completion request.

    Raises:
        ApiError: 400, naming the field.
    """
    values = parse(body, CHAT)
    top, newer, older = values["top_logprobs"], values["max_completion_tokens"], values["max_tokens"]
    if top is not None and not values["logprobs"]:
        raise checks.refusal(top, "top_logprobs", "logprobs=true beside it")
    if newer is not None and older is not None and newer != older:
        raise checks.refusal(older, "max_tokens", f"only one of it and max_completion_tokens={newer}")
    values["max_tokens"] = older if newer is None else newer
    logprobs = (top or 0) if values["logprobs"] else None
    return Call(messages=values["messages"], logprobs=logprobs, **_shared(values))


def _shared(values: dict[str, Any]) -> dict[str, Any]:
    if values["stream_options"] is not None and not values["stream"]:
        message = "stream_options is only for streams; leave it out or send stream=true"
        raise ApiError(400, message, param="stream_options", code="invalid_value")
    if values["seed"] is not None and values["seed"] + values["n"] - 1 > LARGEST:
        raise checks.refusal(values["seed"], "seed", f"at most 2**63 - {values['n']}, because choice i uses seed + i")
    names = ("temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos")
    shared = {name: values[name] for name in ("model", "n", "seed", "max_tokens", "stream", "user")}
    return {
        **shared,
        "include_usage": bool(values["stream_options"]),
        "sampling": {name: values[name] for name in names},
    }


def encode(call: Call, tokenizer: Tokenizer, options: ServeOptions) -> list[Prompt]:
    """Return the prompts as ids.

    Raises:
        ApiError: 400: the tokenizer refuses them, an id is unknown, a prompt is empty or too long.
    """
    name = "messages" if call.messages else "prompt"
    try:
        prompts = [_chat(call, tokenizer)] if call.messages else _texts(call, tokenizer, options)
    except ValueError as error:
        raise ApiError(400, f"{name}: {error}", param=name, code="invalid_value") from error
    for prompt in prompts:
        _check_prompt(prompt, name, tokenizer.vocab_size)
        _check_length(len(prompt.ids), call, name, options)
    return prompts


def _chat(call: Call, tokenizer: Tokenizer) -> Prompt:
    return Prompt(tokenizer.chat(call.messages, add_generation_prompt=True).ids)


def _texts(call: Call, tokenizer: Tokenizer, options: ServeOptions) -> list[Prompt]:
    texts = [text for text in call.prompts if isinstance(text, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    prompts: list[Prompt] = []
    for prompt in call.prompts:
        if prompt is None:
            prompts.append(Prompt(tokenizer.eos_ids[:1]))
        elif isinstance(prompt, str):
            prompts.append(Prompt([*options.prompt_prefix, *next(encoded)], prompt if call.echo else ""))
        else:
            prompts.append(Prompt(prompt, tokenizer.decode(prompt) if call.echo else ""))
    return prompts


def _check_prompt(prompt: Prompt, name: str, vocab_size: int) -> None:
    if not len(prompt.ids):
        message = f"{name} has no tokens; expected at least one (null stands for an empty document)"
        raise ApiError(400, message, param=name, code="invalid_value")
    if max(prompt.ids) >= vocab_size:
        message = f"{name} has the token id {max(prompt.ids)}; expected ids below {vocab_size}"
        raise ApiError(400, message, param=name, code="invalid_value")


def _check_length(tokens: int, call: Call, name: str, options: ServeOptions) -> None:
    limit = options.context_length
    if limit is None:
        return
    wanted = call.params(tokens, 0, options).max_tokens
    if tokens + wanted > limit:
        message = f"{name} has {tokens} tokens and the reply may have {wanted}; expected at most {limit} together"
        raise ApiError(400, message, param=name, code="context_length_exceeded")
