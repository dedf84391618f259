"""Fields of a request's body: null is the default, and an answer never pretends.

A field that is known and asks for what is not supported is refused by name. One that is not known
is left alone and reported: in the answer's header `x-ignored-fields`, and once in the log.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.server.errors import Refused

log = logging.getLogger(__name__)

IDLE: tuple[Any, ...] = (False, "", [], {})
"""Values by which a field asks for nothing that is not on by default."""

USE_FORMAT = "; use response_format"
USE_TOOLS = "; use tools"
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_token_ids": ((), ""),
    "audio": ((), ""),
    "bad_words": ((), ""),
    "chat_template": ((), "; the server's is set by --chat_template"),
    "documents": ((), ""),
    "early_stopping": ((), ""),
    "function_call": (("none", "auto"), USE_TOOLS),
    "functions": ((), USE_TOOLS),
    "guided_choice": ((), USE_FORMAT),
    "guided_grammar": ((), USE_FORMAT),
    "guided_json": ((), USE_FORMAT),
    "guided_regex": ((), USE_FORMAT),
    "kv_transfer_params": ((), ""),
    "length_penalty": ((1, 1.0), ""),
    "logits_processors": ((), ""),
    "media_io_kwargs": ((), ""),
    "mm_processor_kwargs": ((), ""),
    "modalities": ((["text"],), ""),
    "moderation": ((), ""),
    "prompt_embeds": ((), ""),
    "return_token_ids": ((), ""),
    "return_tokens_as_token_ids": ((), ""),
    "service_tier": (("auto", "default"), ""),
    "skip_special_tokens": ((True,), "; special tokens are no part of the text"),
    "spaces_between_special_tokens": ((True,), ""),
    "store": ((), "; nothing is stored"),
    "structured_outputs": ((), USE_FORMAT),
    "suffix": ((), ""),
    "truncate_prompt_tokens": ((), ""),
    "use_beam_search": ((), ""),
    "verbosity": (("medium",), ""),
    "vllm_xargs": ((), ""),
    "web_search_options": ((), ""),
}
"""Known fields that are not supported: the values that ask for nothing, and what to do instead."""

WITHOUT_EFFECT = frozenset(
    (
        "cache_salt", "include_reasoning", "metadata", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "request_id", "safety_identifier", "user",
    )
)  # fmt: skip
"""Known fields that change nothing of an answer: whom it is for, and hints."""

MOST_REPORTED = 100
"""Names that the log reports at the most."""

_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_reported: set[str] = set()


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @classmethod
    def of(cls, data: dict[str, Any]) -> Self:
        """The body with the fields in `data`. Raises Refused."""
        given = {name: value for name, value in data.items() if value is not None}
        for name, value in given.items():
            if name in UNSUPPORTED and name not in cls.model_fields:
                _refuse_unsupported(name, value)
        try:
            body = cls.model_validate(given)
        except ValidationError as error:
            raise _invalid(error) from error
        report(body.ignored)
        return body

    @property
    def ignored(self) -> list[str]:
        """Names of the fields without effect that may be meant to have one."""
        extra = self.model_extra or {}
        return sorted(extra.keys() - UNSUPPORTED.keys() - WITHOUT_EFFECT)

    @property
    def headers(self) -> dict[str, str]:
        """The report of the fields that were ignored, for the answer."""
        names = [name for name in self.ignored if _PLAIN.fullmatch(name)]
        return {"x-ignored-fields": ", ".join(names[:20])[:500]} if names else {}


def _refuse_unsupported(name: str, value: Any) -> None:
    neutral, remedy = UNSUPPORTED[name]
    idle = IDLE if True not in neutral else ()
    if not any(value == one and type(value) is type(one) for one in (*idle, *neutral)):
        raise Refused(
            400,
            f"{name}={value!r:.60} is not supported{remedy}",
            param=name,
            code="unsupported_parameter",
        )


def _invalid(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_context=False)[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "missing":
        message, code = f"{where[0]}: the request has none", "missing_required_parameter"
        return Refused(400, message, param=where[0], code=code)
    told = first["msg"].removeprefix("Value error, ")
    param = where[0] if where else None
    return Refused(400, f"{'.'.join(where)}: {told}" if where else told, param=param)


def report(names: list[str]) -> None:
    """Tell the log of fields that are ignored, each once."""
    for name in names:
        if name not in _reported and len(_reported) < MOST_REPORTED:
            _reported.add(name)
            log.warning("requests have the field %.80r, which is ignored", name)
