"""The guard of the server: a bearer token and limits on bodies, checked before a body is read."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Iterable
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import Refused

log = logging.getLogger(__name__)

OPEN = ("/health", "/ping")
"""Paths that need no token, whatever else is served."""

REQUEST_ID = "x-request-id"


class Guard:
    """ASGI middleware: a bearer token (None asks for none), limits on the body's bytes and on the
    seconds until it is there, and an id for every answer.

    unguarded: more paths that need no token.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        max_body: int,
        body_timeout: float,
        unguarded: Iterable[str] = (),
    ) -> None:
        self._app, self._token, self._open = app, token, frozenset((*OPEN, *unguarded))
        self._max_body, self._body_timeout = max_body, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, send = Headers(scope=scope), Identified(send)
        try:
            self._admit(scope["path"], headers)
            body = await asyncio.wait_for(self._read(headers, receive), self._body_timeout)
        except TimeoutError:
            late = f"the request's body was not there within {self._body_timeout:g} seconds"
            closing = {"Connection": "close"}
            await Refused(408, late, headers=closing).response()(scope, receive, send)
        except Refused as refused:
            await refused.response()(scope, receive, send)
        else:
            if body is not None:
                await self._run(scope, _replay(body, receive), send)

    async def _run(self, scope: Scope, receive: Receive, send: Identified) -> None:
        """Run the application, whose own failures are told to the log, not to the client."""
        try:
            await self._app(scope, receive, send)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if send.has_begun:
                raise
            failed = Refused(500, "the server failed to answer; its log has the reason")
            await failed.response()(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> None:
        if path not in self._open and not self._is_known(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "this server asks for its bearer token", headers=challenge)

    def _is_known(self, authorization: str) -> bool:
        if self._token is None:
            return True
        kind, _, sent = authorization.partition(" ")
        same = hmac.compare_digest(sent.strip().encode("utf-8", "replace"), self._token.encode())
        return same and kind.lower() == "bearer"

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None where the client went away. Raises Refused for one too long."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._max_body):
            raise self._too_long()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                raise self._too_long()
        return bytes(body)

    def _too_long(self) -> Refused:
        message = f"the request has more than {self._max_body} bytes"
        return Refused(413, message, headers={"Connection": "close"})


class Identified:
    """Sends an answer with an id of its own, which clients show beside an error."""

    def __init__(self, send: Send) -> None:
        self._send, self.has_begun = send, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            MutableHeaders(scope=message).setdefault(REQUEST_ID, uuid4().hex)
        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receives the body that was read, then whatever comes: the disconnect."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
