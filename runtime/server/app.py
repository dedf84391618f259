"""The application: routes, errors, and the model behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from runtime.engine.engine import Engine
from runtime.server.auth import Guard
from runtime.server.errors import Refused
from runtime.server.handlers import Handlers
from runtime.server.live.page import page_routes
from runtime.server.settings import ServerSettings
from runtime.server.tokenization import Tokenization
from runtime.serving.async_server import AsyncServer
from runtime.serving.chat import check_template
from runtime.serving.settings import ServeSettings

POST = ["POST"]


def build_app(
    engine: Engine, tokenizer: Any, settings: ServerSettings, token: str | None
) -> FastAPI:
    """The application; the steps run while its lifespan lasts. token: what clients must send.

    Raises ValueError for a chat template that cannot be read.
    """
    template = settings.read_template()
    if template is not None:
        check_template(tokenizer, template)
    options = {f.name: getattr(settings, f.name) for f in fields(ServeSettings)}
    server = AsyncServer(engine, tokenizer=tokenizer, **options)
    handlers = Handlers(server, tokenizer, settings, template)
    page = page_routes() if settings.has_page else []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server:
            yield

    app = FastAPI(title="ExpertFlow", lifespan=lifespan)
    app.state.handlers, app.state.engine = handlers, engine
    app.add_middleware(
        Guard,
        token=token,
        max_body=settings.max_body,
        body_timeout=settings.body_timeout,
        unguarded=[route.path for route in page],
    )
    app.router.routes.extend(page)
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(HTTPException, _no_route)
    _add_routes(app, handlers)
    tokens = Tokenization(
        tokenizer, template, handlers.check_model,
        context=settings.context, vocab_size=engine.topology.vocab_size,
    )  # fmt: skip
    app.add_api_route("/tokenize", tokens.tokenize, methods=POST)
    app.add_api_route("/detokenize", tokens.detokenize, methods=POST)
    return app


def _add_routes(app: FastAPI, handlers: Handlers) -> None:
    asked: dict[str, Any] = {
        "/health": handlers.health,
        "/ping": handlers.health,
        "/metrics": handlers.metrics,
        "/version": _version,
        "/v1/models": handlers.models,
        "/v1/models/{name:path}": handlers.model,
    }
    for path, handler in asked.items():
        app.add_api_route(path, handler, methods=["GET"])
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/v1/expertflow/events", handlers.events, methods=["GET"])
    app.add_api_route("/v1/completions", handlers.completions, methods=POST)
    app.add_api_route("/v1/chat/completions", handlers.chat, methods=POST)


def load_app(settings: ServerSettings) -> FastAPI:
    """The application with its model loaded. Raises ValueError or OSError."""
    token, template = settings.read_token(), settings.read_template()
    tokenizer = settings.read_tokenizer()
    if template is not None:
        check_template(tokenizer, template)  # before the model, which takes long
    return build_app(settings.load(), tokenizer, settings, token)


async def _version() -> dict[str, str]:
    try:
        return {"version": version("moe-expertflow")}
    except PackageNotFoundError:  # run from a copy of the sources
        return {"version": "unknown"}


async def _refuse(_: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    return refused.response()


async def _no_route(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{http.method} {http.url.path}"
    told = {404: f"there is no {asked}", 405: f"{asked} is not allowed"}
    code = "unknown_url" if error.status_code == 404 else None
    refused = Refused(
        error.status_code,
        told.get(error.status_code, str(error.detail)),
        code=code,
        headers=error.headers,
    )
    return refused.response()
