"""The guard of the server: a bearer token and a limit on bodies, checked before a body is read."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.openai_schema import error

OPEN = ("/health",)
"""Paths that need no token."""


class Guard:
    """ASGI middleware: a bearer token (None asks for none) and a limit on the body's bytes."""

    def __init__(self, app: ASGIApp, token: str | None, max_body: int) -> None:
        self._app, self._token, self._max_body = app, token, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN and not self._is_known(headers.get("authorization", "")):
            answer = error("this server asks for its bearer token", "authentication_error")
            await JSONResponse(answer, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        body = await self._read(headers, receive)
        if body is None:
            answer = error(f"the request has more than {self._max_body} bytes")
            await JSONResponse(answer, 413, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _is_known(self, authorization: str) -> bool:
        if self._token is None:
            return True
        sent = authorization.encode("utf-8", "replace")
        return hmac.compare_digest(sent, f"Bearer {self._token}".encode())

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None as soon as it is too long."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_body:
            return None
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                return None
        return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receives the body that was read, then whatever comes: the disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
