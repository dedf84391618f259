"""The page at /: files of this package, and headers that let it load and run nothing else.

It holds nothing about the model: what it shows it asks of the API, with the token if there is one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runtime.server.live.page_files import KINDS, page_files

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def page_routes() -> list[Route]:
    """The routes of the page."""
    return [
        Route(path, _sender(file), include_in_schema=False) for path, file in page_files().items()
    ]


def _sender(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content, kind = file.read_bytes(), KINDS[file.suffix]

    async def send(_: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send
