"""``dovetail serve`` and ``dovetail generate``: a model from a directory behind the OpenAI API, or in the terminal."""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail_protocols import CommandError

if TYPE_CHECKING:
    from openai import OpenAI

    from dovetail.pretrained import Pretrained
    from dovetail_engine import Engine
    from dovetail_protocols import Request

__all__ = ["Answer", "Generate", "Serve", "ask", "running"]


_LOG = logging.getLogger("dovetail")


def cache_directory() -> Path:
    """Return where compiled programs are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dovetail" / "compiled"


@contextlib.contextmanager
def running(
    model: "Pretrained", *, max_running: int, max_length: int | None, cache: Path | None
) -> "Generator[Engine, None, None]":
    """Run an engine for a model; compiled programs are kept in `cache`."""
    import functools

    import dovetail_engine
    import dovetail_models

    if cache is not None:
        try:
            dovetail_engine.compilation_cache(cache)
        except OSError as error:
            _LOG.warning("compiled programs are not kept: %s", error)
    if max_length is not None and max_length > model.length:
        raise CommandError(f"max_length={max_length}; {model.name} was trained on at most {model.length} tokens")
    length = min(model.length, 4096) if max_length is None else max_length
    options = dovetail_engine.EngineOptions(max_running=max_running, max_length=length)
    build = functools.partial(dovetail_models.merge, model.definition)
    with dovetail_engine.Engine(build, model.params, tokenizer=model.tokenizer, options=options) as engine:
        yield engine


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server answered, and how fast.

    Attributes:
        text: of the reply.
        tokens: of the reply.
        first_seconds: from the request to the first text.
        seconds: of the whole reply.
    """

    text: str
    tokens: int
    first_seconds: float
    seconds: float


def ask(directory: Path, prompts: Sequence[str], *, max_tokens: int, seed: int) -> tuple[list[Answer], float]:
    """Serve a model on a free port, have the OpenAI client ask it to continue each prompt, and stop the server.

    Returns:
        The answers, and the seconds from opening the model to a server that answered.
    """
    import openai

    import dovetail_serve
    from dovetail.pretrained import Pretrained

    begin = time.perf_counter()
    model = Pretrained.open(directory)
    with (
        running(model, max_running=1, max_length=None, cache=None) as engine,
        dovetail_serve.Server(engine, model.tokenizer, model=model.name) as server,
        openai.DefaultHttpxClient(trust_env=False) as direct,  # a proxy knows no server of this machine
        openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, http_client=direct) as client,
    ):
        ready = time.perf_counter() - begin
        rooms = [engine.options.max_length - len(model.tokenizer.encode(prompt)) for prompt in prompts]
        counts = [min(max_tokens, room) for room in rooms]
        try:
            return [_answer(client, model.name, *each, seed) for each in zip(prompts, counts, strict=True)], ready
        except openai.OpenAIError as error:
            raise CommandError(f"the server at {server.base_url} did not answer: {error}") from error


def _answer(client: "OpenAI", model: str, prompt: str, max_tokens: int, seed: int) -> Answer:
    begin = time.perf_counter()
    chunks = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0.7,
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, tokens, first = "", 0, 0.0
    for chunk in chunks:
        text += "".join(choice.text for choice in chunk.choices)
        first = first or (time.perf_counter() - begin if text else 0.0)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    seconds = time.perf_counter() - begin
    return Answer(text, tokens, first or seconds, seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over the OpenAI API until Ctrl-C or SIGTERM."""

    model: Path
    """A Hugging Face directory, a run's directory, or one of its checkpoints."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 for any free one."""
    name: str | None = None
    """Name of the model in requests; that of its directory by default."""
    max_running: int = 16
    """Requests that run at once; others wait."""
    max_length: int | None = None
    """Tokens of a prompt and its reply together; the model's own limit by default, at most 4096."""
    max_queue: int = 256
    """Requests that wait or run; further ones are told to come back later."""
    drain_seconds: float = 30.0
    """How long a server that was told to stop goes on with what it has accepted."""
    mapped: bool = False
    """On a CPU, leave float32 weights in the files of a Hugging Face directory that Dovetail wrote (``dovetail models
    convert``): nothing is copied, and servers of one model share memory."""
    cache: Path | None = dataclasses.field(default_factory=cache_directory)
    """Where compiled programs are kept for the next start."""

    def run(self) -> int:
        """Serve until a signal."""
        import dovetail_serve
        from dovetail.pretrain import user_errors
        from dovetail.ui import UI

        ui = UI()
        with user_errors():
            from dovetail.pretrained import Pretrained

            model = Pretrained.open(self.model, mapped=self.mapped)
            name = self.name or model.name
            options = dovetail_serve.ServeOptions(
                max_queue=self.max_queue,
                drain_seconds=self.drain_seconds,
                prompt_prefix=model.tokenizer.prompt_prefix,
            )
            ui.say(f"compiling for {name}")
            with running(model, max_running=self.max_running, max_length=self.max_length, cache=self.cache) as engine:
                dovetail_serve.serve(
                    engine,
                    model.tokenizer,
                    model=name,
                    host=self.host,
                    port=self.port,
                    options=options,
                    ready=lambda url: ui.say(f"serving {name} at {url}/v1 (Ctrl-C stops)"),
                )
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a model and print the text as it comes."""

    model: Path
    """A Hugging Face directory, a run's directory, or one of its checkpoints."""
    prompt: str
    """Text to continue."""
    max_tokens: int = 128
    """Tokens at most; less where the model's own limit leaves less."""
    temperature: float = 0.7
    """0 always takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that hold this mass."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest."""
    seed: int | None = None
    """The same seed gives the same text; without one every text is new."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    cache: Path | None = dataclasses.field(default_factory=cache_directory)
    """Where compiled programs are kept for the next start."""

    def run(self) -> int:
        """Print prompt and continuation."""
        from dovetail.pretrain import user_errors

        with user_errors():
            from dovetail.pretrained import Pretrained

            model = Pretrained.open(self.model)
            request = self._request(model)
            length = max(2, len(request.prompt) + request.sampling.max_tokens)
            with running(model, max_running=1, max_length=length, cache=self.cache) as engine:
                print(self.prompt, end="", flush=True)
                with engine.submit(request) as stream:
                    for delta in stream:
                        print(delta.text, end="", flush=True)
                        if delta.error:
                            raise CommandError(delta.error)
                print()
        return 0

    def _request(self, model: "Pretrained") -> "Request":
        from dovetail_protocols import Request, SamplingParams

        ids = model.tokenizer.encode(self.prompt)
        if not ids:
            raise CommandError(f"--prompt {self.prompt!r} holds no token; expected some text")
        ids = [*model.tokenizer.prompt_prefix, *ids]
        room = min(model.length, 4096) - len(ids)
        if room < 1:
            raise CommandError(f"the prompt has {len(ids)} tokens; the model's limit is {len(ids) + room}")
        sampling = SamplingParams(
            max_tokens=min(self.max_tokens, room),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
        )
        return Request(prompt=ids, sampling=sampling)
