"""A load client: streams OpenAI completions over HTTP, so many at a time, and tells what a user would notice.

    python load.py --url http://127.0.0.1:8000 [--requests 32] [--at-once 8]
    python load.py --serve "dovetail serve MODEL --port {port}"

prints output tokens per second, the time to the first token (TTFT) and the time per token after it (TPOT) in
milliseconds, and with ``--serve`` the seconds from the start of the command until ``/health`` answers.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import http.client
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from worker import die_with_parent
from workload import Job, jobs

LOAD = {"requests": 32, "at_once": 8, "prompt": 128, "output": 64, "vocab": 4096, "seed": 0}


class LoadError(Exception):
    """A server did not start, or answered otherwise than the protocol says."""


@dataclasses.dataclass
class Reply:
    """What came back for one request; times are those of `time.perf_counter`."""

    sent: float
    first: float = math.nan
    last: float = math.nan
    text: str = ""
    tokens: int = 0

    def add(self, event: Mapping[str, Any]) -> None:
        """Note one event of the stream."""
        if "error" in event:
            raise LoadError(f"the stream ended with {event['error']}")
        text = "".join(choice["text"] for choice in event["choices"])
        if text:
            self.last = time.perf_counter()
            self.first = self.last if math.isnan(self.first) else self.first
            self.text += text
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]


async def complete(url: str, model: str, job: Job) -> Reply:
    """Send one request and read its stream to the end.

    Raises:
        LoadError: the status is not 200, or the stream is not what was asked for.
    """
    target = urllib.parse.urlsplit(url)
    body = {"model": model, "prompt": job.prompt, "max_tokens": job.output, "temperature": 0.0, "stream": True}
    content = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    reply = Reply(time.perf_counter())
    reader, writer = await asyncio.open_connection(target.hostname, target.port, limit=2**20)
    try:
        writer.write(head.encode() + content)
        async for event in _events(reader):
            if event == "[DONE]":
                break
            reply.add(json.loads(event))
        else:
            raise LoadError("the stream ended without [DONE]")
    except (OSError, asyncio.IncompleteReadError) as error:
        raise LoadError(f"the connection broke: {error!r}") from error
    finally:
        writer.close()
    if reply.tokens != job.output:
        raise LoadError(f"{reply.tokens} tokens came for max_tokens={job.output}")
    return reply


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The data of server-sent events."""
    status = (await reader.readline()).decode()
    headers = {}
    while line := (await reader.readline()).decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip().lower()
    body = _chunks(reader) if headers.get("transfer-encoding") == "chunked" else _rest(reader)
    if status.split(" ")[1:2] != ["200"]:
        text = b"".join([part async for part in body]).decode(errors="replace")
        raise LoadError(f"the server answered {status.strip()!r}: {text[:500]}")
    buffer = b""
    async for part in body:
        *lines, buffer = (buffer + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(2**16):
        yield part


async def send(url: str, work: Sequence[Job], at_once: int) -> list[Reply]:
    """Send requests in order, the next when one of `at_once` has ended; return the replies in the same order.

    Raises:
        LoadError: one failed.
    """
    model = await asyncio.to_thread(_model, url)
    replies: list[Reply | None] = [None] * len(work)
    waiting = iter(range(len(work)))

    async def client() -> None:
        for index in waiting:
            replies[index] = await complete(url, model, work[index])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(client())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [reply for reply in replies if reply is not None]


def _model(url: str) -> str:
    """The first model that the server offers."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


def summary(replies: Sequence[Reply]) -> dict[str, float]:
    """Percentiles in milliseconds: time to the first token, and per further token of a reply."""
    ttft = [reply.first - reply.sent for reply in replies]
    tpot = [(reply.last - reply.first) / (reply.tokens - 1) for reply in replies if reply.tokens > 1]
    return {
        f"{name}_p{percent}_ms": round(percentile(values, percent) * 1e3, 2)
        for name, values in (("ttft", ttft), ("tpot", tpot))
        for percent in (50, 99)
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@contextlib.contextmanager
def server(
    command: Sequence[str], timeout: float = 300.0, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[str, float]]:
    """Run a server while the block runs; give its URL and the seconds that it took to be ready.

    It allocates memory as a user's would: a worker's settings for that are not passed on.

    Args:
        command: words in which ``{port}`` stands for a free port.
        timeout: seconds to wait for ``/health``.
        variables: added to its environment.

    Raises:
        LoadError: it ended, or is not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in command]
    started = time.perf_counter()
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = {**usual, **(variables or {})}
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        env=environment,
        preexec_fn=die_with_parent,  # noqa: PLW1509  (nothing here runs threads)
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not healthy(url):
            if process.poll() is not None:
                raise LoadError(f"{shlex.join(words)} ended with exit code {process.returncode}")
            if time.perf_counter() - started > timeout:
                raise LoadError(f"{shlex.join(words)} is not ready after {timeout:g} s")
            time.sleep(0.02)
        yield url, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        process.kill()
        process.wait()


def healthy(url: str) -> bool:
    """Tell whether ``/health`` answers 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, http.client.HTTPException):
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Send a load from the command line and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--url", help="of a server that runs")
    which.add_argument("--serve", help="a command that starts one, with {port} in it")
    for name, default in LOAD.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    given = vars(parser.parse_args(arguments))
    work = jobs(given)
    with contextlib.ExitStack() as stack:
        url, ready = given["url"], None
        if url is None:
            url, ready = stack.enter_context(server(shlex.split(given["serve"])))
        started = time.perf_counter()
        replies = asyncio.run(send(url.rstrip("/"), work, given["at_once"]))
        rate = sum(job.output for job in work) / (time.perf_counter() - started)
    result = {"tokens_per_second": round(rate, 1), **summary(replies)}
    print(json.dumps(result if ready is None else {**result, "ready_s": round(ready, 2)}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LoadError as error:
        sys.exit(f"load: {error}")
