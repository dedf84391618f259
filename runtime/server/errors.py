"""Errors as OpenAI's API writes them: a message, a type, the parameter and a code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    499: "client_closed_request",
    500: "internal_error",
    503: "service_unavailable",
}
RETRY_AFTER = {429: "1", 503: "5"}
"""Seconds to wait before a request that was turned away is sent again."""

ALIASES = {"json_schema": "response_format"}
"""Fields of requests whose name is another in a body."""

TOO_LONG = "context_length_exceeded"


class Refused(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.code = code or CODES.get(status, "error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": KINDS.get(self.status, kind)}
        return {"error": error | {"param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer of this refusal."""
        wait = RETRY_AFTER.get(self.status)
        headers = ({} if wait is None else {"Retry-After": wait}) | self.headers
        return JSONResponse(self.body, self.status, headers)


def bad_request(error: Exception, fields: Mapping[str, Any], default: str) -> Refused:
    """The refusal of a request whose field `error` names at the beginning.

    default: the field where it names none of `fields`.
    """
    message = str(error)
    named = re.match(r"(?:an? |the )?(\w+)", message)
    name = ALIASES.get(named[1], named[1]) if named else default
    param = name if name in fields else default
    code = TOO_LONG if "exceed the context" in message else None
    return Refused(400, message, param=default if code else param, code=code)
