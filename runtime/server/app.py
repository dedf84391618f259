"""The routes of the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from runtime.engine.engine import Engine
from runtime.server.auth import Guard
from runtime.server.metrics import Metrics
from runtime.server.openai_schema import Answer, Body, ChatBody, CompletionBody, error
from runtime.server.settings import ServerSettings
from runtime.serving.async_server import AsyncServer
from runtime.serving.request import Request as Asked
from runtime.serving.request import Result
from runtime.serving.settings import ServeSettings

DISCONNECT_POLL = 0.2


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def build_app(
    engine: Engine, tokenizer: Any, settings: ServerSettings, token: str | None
) -> FastAPI:
    """The application; the steps run while its lifespan lasts. token: what clients must send."""
    options = {f.name: getattr(settings, f.name) for f in fields(ServeSettings)}
    server = AsyncServer(engine, tokenizer=tokenizer, **options)
    handlers = Handlers(server, tokenizer, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server:
            yield

    app = FastAPI(title="ExpertFlow", lifespan=lifespan)
    app.add_middleware(Guard, token=token, max_body=settings.max_body)
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_api_route("/health", handlers.health)
    app.add_api_route("/metrics", handlers.metrics)
    app.add_api_route("/v1/models", handlers.models)
    app.add_api_route("/v1/completions", handlers.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", handlers.chat, methods=["POST"])
    return app


def load_app(settings: ServerSettings) -> FastAPI:
    """The application with its model loaded. Raises ValueError or OSError."""
    token = settings.read_token()
    engine = settings.load()
    tokenizer = settings.read_tokenizer()
    return build_app(engine, tokenizer, settings, token)


class Handlers:
    """Takes requests in and gives answers out."""

    def __init__(self, server: AsyncServer, tokenizer: Any, settings: ServerSettings) -> None:
        self._server, self._tokenizer, self._settings = server, tokenizer, settings
        self._metrics = Metrics(server)

    async def health(self) -> JSONResponse:
        failure = self._server.failure
        return JSONResponse({"status": failure or "ok"}, 503 if failure else 200)

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        model = {"id": self._settings.model_name, "object": "model", "owned_by": "expertflow"}
        return {"object": "list", "data": [model | {"created": 0}]}

    async def completions(self, body: CompletionBody, http: Request) -> Response:
        return await self._answer(body, http)

    async def chat(self, body: ChatBody, http: Request) -> Response:
        return await self._answer(body, http)

    async def _answer(self, body: Body, http: Request) -> Response:
        asked = self._requests(body)
        answer = Answer(body, self._tokenizer)
        if body.stream:
            events = self._events(answer, asked, body.wants_usage)
            first = await anext(events)  # a refusal is then a status, not an event
            return StreamingResponse(_joined(first, events), media_type="text/event-stream")
        return JSONResponse(answer.whole(await self._all(asked, http)))

    def _requests(self, body: Body) -> list[Asked]:
        if body.model != self._settings.model_name:
            raise Refused(404, f"there is no model {body.model}; {self._settings.model_name} is")
        try:
            asked = body.requests(self._tokenizer)
        except ValueError as bad:
            raise Refused(400, str(bad)) from bad
        if self._server.failure:
            raise Refused(503, f"the server has failed: {self._server.failure}", "server_error")
        if self._server.num_open + len(asked) > self._settings.max_queue:
            raise Refused(429, "too many requests are waiting; try again later", "rate_limit_error")
        return asked

    async def _all(self, asked: list[Asked], http: Request) -> list[Result]:
        """The results of all, unless the client goes away, which cancels them."""
        tasks = [asyncio.create_task(self._server.complete(request)) for request in asked]
        try:
            pending: set[asyncio.Task[Result]] = set(tasks)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=DISCONNECT_POLL)
                if pending and await http.is_disconnected():
                    raise Refused(499, "the client went away")
            return [self._ended(task.result()) for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    def _ended(self, result: Result) -> Result:
        self._metrics.observe(result)
        if result.finish == "error":
            raise Refused(400, result.error)
        if result.finish == "cancelled":
            raise Refused(503, "the server is shutting down", "server_error")
        return result

    async def _events(self, answer: Answer, asked: list[Asked], usage: bool) -> AsyncIterator[str]:
        """Server-sent events of all choices as they come; closing the iterator cancels them."""
        items: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        readers = [
            asyncio.create_task(self._read(index, request, items))
            for index, request in enumerate(asked)
        ]
        results: list[Result] = []
        opening = answer.opening()
        try:
            while len(results) < len(asked):
                index, item = await items.get()
                if isinstance(item, Result):
                    results.append(self._ended(item))
                for event in (*opening, answer.piece(index, item)):
                    if event is not None:
                        yield _event(event)
                opening = []
            if usage:
                yield _event(answer.closing(results))
            yield "data: [DONE]\n\n"
        finally:
            for reader in readers:
                reader.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*readers, return_exceptions=True)

    async def _read(self, index: int, request: Asked, items: asyncio.Queue[Any]) -> None:
        stream = self._server.stream(request)
        try:
            async for item in stream:
                items.put_nowait((index, item))
        finally:
            await stream.aclose()  # type: ignore[attr-defined]


async def _joined(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for event in rest:
            yield event
    except Refused as refused:  # too late for a status
        yield _event(error(str(refused), refused.kind))
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def _event(data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _refuse(_: Request, refused: Exception) -> JSONResponse:
    assert isinstance(refused, Refused)
    return JSONResponse(error(str(refused), refused.kind), refused.status)


async def _invalid(_: Request, invalid: Exception) -> JSONResponse:
    assert isinstance(invalid, RequestValidationError)
    first = invalid.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse(error(f"{where}: {first['msg']}"), 400)
