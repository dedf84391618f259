"""Lines of OpenAI's batch API: a body for one of its addresses, and the answer to it.

Needs the extra `serve`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from runtime.server.errors import Refused, bad_request
from runtime.server.protocol.answers import Answer
from runtime.server.protocol.chat import ChatBody
from runtime.server.protocol.chat_answer import ChatAnswer
from runtime.server.protocol.completion import CompletionBody
from runtime.server.protocol.completion_answer import CompletionAnswer
from runtime.server.protocol.token_text import TokenText
from runtime.server.protocol.tool_calls import format_of, markers_of
from runtime.serving.batch.columns import misspelt
from runtime.serving.batch.settings import BatchSettings
from runtime.serving.chat import template_of
from runtime.serving.request import Request, Result

Body = CompletionBody | ChatBody

URLS = ("/v1/completions", "/v1/chat/completions")
MOST_CHOICES = 128
"""Choices of one line."""

Line = tuple[dict[str, Any], str]
"""An answer as OpenAI writes it, and the error in it, if there is one."""


class OpenAILines:
    """Reads lines, and writes answers."""

    def __init__(self, settings: BatchSettings, tokenizer: Any, template: str | None) -> None:
        """template: the chat template in place of the tokenizer's own."""
        self._settings, self._tokenizer, self._template = settings, tokenizer, template
        self._text, self._markers = TokenText(tokenizer), markers_of(tokenizer)

    def read(
        self, data: dict[str, Any], seed: int
    ) -> tuple[list[Request], Callable[[list[Result]], Line] | None, Line | None]:
        """The requests of a line and what answers it, or its refusal.

        seed: where the line has none of its own.
        """
        id = data.get("custom_id")
        try:
            body = self._body(data, seed)
            answer, requests = self._prepare(body)
        except Refused as refused:
            return [], None, _line(id, refused.status, refused.body, str(refused))

        def outcome(results: list[Result]) -> Line:
            bad = next((one for one in results if one.finish not in ("stop", "length")), None)
            if bad is None:
                return _line(id, 200, answer.whole(results))
            reason = bad.error or f"the request was {bad.finish}"
            status = bad_request(ValueError(reason), type(body).model_fields, body.prompt_field)
            if bad.finish != "error" or getattr(bad, "fault", "") == "server":
                status = Refused(500, reason)
            return _line(id, status.status, status.body, reason)

        return requests, outcome, None

    def _body(self, data: dict[str, Any], seed: int) -> Body:

        if not isinstance(data.get("custom_id"), str):
            raise Refused(400, "the line has no custom_id of text", param="custom_id")
        if data.get("method", "POST") != "POST":
            raise Refused(405, f"method={data['method']!r:.40} is not POST", param="method")
        url = data["url"]
        if url not in URLS:
            raise Refused(404, f"url={url!r:.100} is not one of {', '.join(URLS)}", param="url")
        if not isinstance(data.get("body"), dict):
            raise Refused(400, "the line has no body that is an object", param="body")
        kind = CompletionBody if url == URLS[0] else ChatBody
        body: Body = kind.of(data["body"])
        for name in body.ignored:
            if near := misspelt(name, type(body).model_fields):
                raise Refused(400, f"{name} is no field; did you mean {near}?", param=name)
        self._check(body)
        return body if body.seed is not None else body.model_copy(update={"seed": seed})

    def _check(self, body: Body) -> None:

        names = self._settings.names
        if body.model is not None and body.model not in names:
            asked = f"there is no model {body.model!s:.200}; {names[0]} is: --name says its name"
            raise Refused(404, asked, param="model", code="model_not_found")
        if body.stream:
            raise Refused(400, "an answer in a batch cannot be streamed", param="stream")
        body.check(max_choices=MOST_CHOICES, max_priority=max(0, body.priority))

    def _prepare(self, body: Body) -> tuple[Answer, list[Request]]:

        name = body.model or self._settings.names[0]
        answer: Answer
        if isinstance(body, ChatBody):
            form = self._tool_format(body)
            prompts = [body.rendered(self._tokenizer, self._template)]
            answer = ChatAnswer(body, name, prompts, self._text, self._markers, form)
        else:
            prompts = body.encoded(self._tokenizer)
            answer = CompletionAnswer(body, name, prompts, self._text, self._tokenizer)
        return answer, body.requests(prompts, self._settings.context)

    def _tool_format(self, body: ChatBody) -> str | None:
        """The form in which the model calls tools, which its chat template tells."""
        tools = body.tools if body.may_call else None
        try:
            form = format_of(template_of(self._tokenizer, self._template, tools))
        except ValueError:  # which rendering reports
            return None
        if tools is None:  # some models tell their thoughts from their answers alike
            return form if form == "harmony" else None
        if form is None and body.must_call is None:
            asked = "the form in which this model calls tools is not known: send tool_choice='none'"
            raise Refused(400, asked, param="tools", code="unsupported_parameter")
        return form


def _line(id: Any, status: int, body: dict[str, Any], error: str = "") -> Line:
    response = {"status_code": status, "request_id": f"req_{uuid4().hex}", "body": body}
    answer = {"id": f"batch_req_{uuid4().hex}", "custom_id": id, "response": response}
    return answer | {"error": None}, error
