"""`create_app`: the ASGI application."""

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from dovetail_protocols import Engine, Tokenizer
from dovetail_serve.bridge import Disconnected
from dovetail_serve.errors import ApiError
from dovetail_serve.generation import generate
from dovetail_serve.options import ServeOptions
from dovetail_serve.state import State
from dovetail_serve.transport import Receive, Scope, Send, send_answer, send_error

__all__ = ["App", "create_app"]

LOG = logging.getLogger("dovetail_serve")
MODELS = "/v1/models"
Handler: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


def create_app(engine: Engine, tokenizer: Tokenizer, *, model: str, options: ServeOptions | None = None) -> "App":
    """Return the OpenAI API of an engine as an ASGI application.

    Args:
        engine: any engine; the application submits to it and neither starts nor closes it.
        tokenizer: the tokenizer of the engine's model.
        model: the name that requests must have in `model`.
        options: limits and defaults.

    Raises:
        TypeError: the engine or the tokenizer lacks something that its contract has.
        ValueError: the model has no name.
    """
    for value, contract in ((engine, Engine), (tokenizer, Tokenizer)):
        if not isinstance(value, contract):
            raise TypeError(f"{type(value).__name__} is no {contract.__name__}; see dovetail_protocols")
    if not model:
        raise ValueError(f"model={model!r}; expected the name that clients ask for")
    options = options or ServeOptions()
    if options.context_length is None:
        options = dataclasses.replace(options, context_length=_length(engine))
    return App(State(engine, tokenizer, model, options))


def _length(engine: Engine) -> int | None:
    try:
        limit = engine.stats().get("max_length")
    except Exception:  # noqa: BLE001  health tells what is wrong with it
        return None
    return None if limit is None else int(limit)


class App:
    """The ASGI application; `create_app` makes it, `state` is for the server around it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/metrics": {"GET": self._metrics},
            MODELS: {"GET": self._models},
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.state.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = False

        async def noting(message: dict[str, Any]) -> None:
            nonlocal sent
            sent = True
            await send(message)

        try:
            await self._route(scope)(scope, receive, noting)
        except Disconnected:
            self.state.metrics.disconnects.inc()
        except ApiError as error:
            await self._refuse(scope, send, error)
        except Exception:
            if sent:
                raise
            LOG.exception("%s %s failed", scope["method"], scope["path"])
            await self._refuse(scope, send, ApiError(500, "internal error", code="internal_error"))

    async def _refuse(self, scope: Scope, send: Send, error: ApiError) -> None:
        self.state.metrics.rejections.labels(str(error.status)).inc()
        headers = [(b"allow", ", ".join(self._methods(scope["path"])).encode())] if error.status == 405 else []
        await send_error(send, error, headers)

    def _methods(self, path: str) -> dict[str, Handler]:
        return {"GET": self._model} if path.startswith(f"{MODELS}/") else self._routes.get(path, {})

    def _route(self, scope: Scope) -> Handler:
        path, method = scope["path"], scope["method"]
        methods = self._methods(path)
        if not methods:
            raise ApiError(404, f"there is no {path[:200]}; expected {', '.join(self._routes)}", code="unknown_url")
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            message = f"{method} {path[:200]} is not allowed; expected {', '.join(methods)}"
            raise ApiError(405, message, code="method_not_allowed")
        return handler

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await self.state.health()
        await send_answer(send, msgspec.json.encode({"status": "ok", "model": self.state.model}))

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self.state.pool, self.state.metrics.text)
        await send_answer(send, text, content_type=CONTENT_TYPE_LATEST.encode())

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send_answer(send, msgspec.json.encode({"object": "list", "data": [self._card()]}))

    async def _model(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        name = scope["path"].removeprefix(f"{MODELS}/")
        if name != self.state.model:
            message = f"the model {name[:200]!r} does not exist; this server has {self.state.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        await send_answer(send, msgspec.json.encode(self._card()))

    def _card(self) -> dict[str, Any]:
        return {"id": self.state.model, "object": "model", "created": self.state.created, "owned_by": "dovetail"}

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await generate(self.state, scope, receive, send, chat=False)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await generate(self.state, scope, receive, send, chat=True)
