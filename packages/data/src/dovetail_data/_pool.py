"""A pool of worker processes (see `_worker`), one thread of the caller waiting on each."""

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dovetail_data._errors import CacheError
from dovetail_data._worker import BOOTSTRAP, Failure
from dovetail_data.corpus import Document
from dovetail_data.tokenise import Encoded, Rules

if TYPE_CHECKING:
    import dovetail_protocols
    from dovetail_data.chat import ChatEncoder

__all__ = ["Pool"]

# The processes are the parallelism: threads of the tokenizers library inside each would only compete.
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class _Process:
    def __init__(self, payload: bytes) -> None:
        command = [sys.executable, "-c", BOOTSTRAP]
        environment = {**os.environ, **_ENVIRONMENT}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        self._payload: bytes | None = payload

    def encode(self, documents: Sequence[Document]) -> Encoded:
        if self._payload is not None:
            self._send(sys.path)
            self._call(self._payload)
            self._payload = None
        return self._call(list(documents))

    def _send(self, value: Any) -> None:
        stream: Any = self._process.stdin
        pickle.dump(value, stream, protocol=5)
        stream.flush()

    def _call(self, value: Any) -> Any:
        stream: Any = self._process.stdout
        try:
            self._send(value)
            reply = pickle.load(stream)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            status = self._process.wait()
            raise RuntimeError(
                f"worker process {self._process.pid} ended with status {status} (was it killed, or short of memory?); "
                "finished shards are kept: build again to continue"
            ) from error
        if isinstance(reply, Failure):
            kind = CacheError if reply.is_cache_error else RuntimeError
            error = kind(f"tokenizing failed in a worker process: {reply.message}")
            error.add_note(reply.details)
            raise error
        return reply

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:  # bytes that nobody will read
                pass


class Pool:
    """Encodes documents in several processes.

    Raises:
        TypeError: the tokenizer does not pickle.
    """

    def __init__(self, workers: int, tokenizer: "dovetail_protocols.Tokenizer | ChatEncoder", rule: Rules) -> None:
        try:
            payload = pickle.dumps((tokenizer, rule), protocol=5)
        except Exception as error:
            raise TypeError(f"the tokenizer does not pickle ({error}); mend that, or pass workers=1") from error
        self._processes = [_Process(payload) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="dovetail-tokenise")

    def submit(self, documents: Sequence[Document]) -> "Future[Encoded]":
        """Queue documents and return a future of their tokens."""
        return self._threads.submit(self._encode, documents)

    def _encode(self, documents: Sequence[Document]) -> Encoded:
        process = self._idle.get()
        try:
            return process.encode(documents)
        finally:
            self._idle.put(process)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.stop()
        self._threads.shutdown(wait=True)
