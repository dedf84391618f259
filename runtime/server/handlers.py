"""The handlers of requests for text: bodies in, answers out."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from runtime.server.errors import Refused, bad_request
from runtime.server.events import EventResponse
from runtime.server.json_body import read_json
from runtime.server.live.feed import Feed
from runtime.server.live.stream import WatchResponse
from runtime.server.metrics import Metrics
from runtime.server.protocol.answers import Answer
from runtime.server.protocol.chat import ChatBody
from runtime.server.protocol.chat_answer import ChatAnswer
from runtime.server.protocol.completion import CompletionBody
from runtime.server.protocol.completion_answer import CompletionAnswer
from runtime.server.protocol.token_text import TokenText
from runtime.server.protocol.tool_calls import format_of, markers_of
from runtime.server.runs import STOPPING, Places, Run
from runtime.server.settings import ServerSettings
from runtime.serving.async_server import AsyncServer
from runtime.serving.chat import template_of


class Handlers:
    """Takes requests in and gives answers out."""

    def __init__(
        self, server: AsyncServer, tokenizer: Any, settings: ServerSettings, template: str | None
    ) -> None:
        """template: the chat template in place of the tokenizer's own."""
        self._server, self._tokenizer, self._settings = server, tokenizer, settings
        self._template = template
        self._text, self._markers = TokenText(tokenizer), markers_of(tokenizer)
        self._places = Places(settings.max_queue)
        self._runs: set[Run] = set()
        self._stopping = False
        self._since = int(time.time())
        self._metrics = Metrics(server)
        chats = template is not None or bool(getattr(tokenizer, "chat_template", None))
        self._feed = Feed(server, settings.model_name, context=settings.context, chats=chats)

    # ------------------------------------------------------------------ what others call

    def stop(self) -> None:
        """Take no further requests."""
        self._stopping = True

    def end_all(self) -> None:
        """End what is in flight, each with a message to its client."""
        self.stop()
        for run in self._runs:
            run.end(Refused(503, STOPPING))

    def check_model(self, name: str | None) -> None:
        """Raise Refused for a model that is not served; a request may name none."""
        served = self._settings.model_name
        if name not in (None, served):
            asked = f"there is no model {name!s:.200}; {served} is"
            raise Refused(404, asked, param="model", code="model_not_found")

    # ------------------------------------------------------------------ routes

    async def health(self) -> JSONResponse:
        failure = self._server.failure or (STOPPING if self._stopping else "")
        return JSONResponse({"status": failure or "ok"}, 503 if failure else 200)

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        self.check_model(name)
        return self._model()

    async def events(self) -> Response:
        self._check_open()
        return WatchResponse(self._feed, lambda: self._stopping)

    async def completions(self, http: Request) -> Response:
        body = CompletionBody.of(await read_json(http))
        return await self._answer(body, http)

    async def chat(self, http: Request) -> Response:
        body = ChatBody.of(await read_json(http))
        return await self._answer(body, http)

    def _model(self) -> dict[str, Any]:
        name = self._settings.model_name
        model = {"id": name, "object": "model", "owned_by": "expertflow", "root": name}
        return model | {
            "created": self._since,
            "parent": None,
            "max_model_len": self._settings.context,
        }

    # ------------------------------------------------------------------ answers

    async def _answer(self, body: CompletionBody | ChatBody, http: Request) -> Response:
        self.check_model(body.model)
        limits = self._settings
        body.check(max_choices=limits.max_choices, max_priority=limits.max_priority)
        self._check_open()
        give_back = self._places.take(body.num_prompts * body.n)
        run: Run | None = None

        async def close() -> None:
            give_back()
            if run is not None:
                self._runs.discard(run)
                await run.close()

        try:
            answer, requests = await self._prepare(body)
            self._check_open()
            observe, fields = self._metrics.observe, type(body).model_fields
            run = Run(self._server, requests, observe, fields, body.prompt_field)
            self._runs.add(run)
            if body.stream:
                first = await run.next(http)  # a refusal is then a status, not an event
                return EventResponse(run, answer, first, close, body.headers)
            while not run.ended:
                await run.next(http)
            results = [run.results[index] for index in range(len(requests))]
            response = JSONResponse(answer.whole(results), headers=body.headers)
        except BaseException:
            await close()
            raise
        await close()
        return response

    def _check_open(self) -> None:
        if self._server.failure:
            raise Refused(503, f"the server has failed: {self._server.failure}")
        if self._stopping:
            raise Refused(503, STOPPING, headers={"Connection": "close"})

    async def _prepare(self, body: CompletionBody | ChatBody) -> tuple[Answer, Any]:
        """The builder of the answer, and the requests. Raises Refused."""
        name, text = self._settings.model_name, self._text
        if isinstance(body, CompletionBody):
            prompts = await asyncio.to_thread(body.encoded, self._tokenizer)
            requests = body.requests(prompts, self._settings.context)
            return CompletionAnswer(body, name, prompts, text, self._tokenizer), requests
        form = self._tool_format(body)
        prompts = [await asyncio.to_thread(body.rendered, self._tokenizer, self._template)]
        requests = body.requests(prompts, self._settings.context)
        return ChatAnswer(body, name, prompts, text, self._markers, form), requests

    def _tool_format(self, body: ChatBody) -> str | None:
        """How the model calls tools. Raises Refused where that has to be known and is not."""
        tools = body.tools if body.may_call else None
        try:
            template = template_of(self._tokenizer, self._template, tools)
        except ValueError as error:
            raise bad_request(error, type(body).model_fields, body.prompt_field) from error
        form = self._settings.tool_format or format_of(template)
        if tools is None:  # but some models tell their thoughts from their answers alike
            return form if form == "harmony" else None
        if form is None and body.must_call is None:
            asked = "the form in which this model calls tools is not known: name --tool_format"
            raise Refused(400, asked, param="tools", code="unsupported_parameter")
        return form
