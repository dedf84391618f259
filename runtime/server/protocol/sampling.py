"""Fields that completions and chats share, and the requests that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, field_validator

from runtime.server.errors import Refused, bad_request
from runtime.server.protocol.fields import Body
from runtime.serving.request import Request

Kind = Literal["text_completion", "chat.completion"]

MOST_STOPS, LONGEST_STOP, MOST_TOKENS_NAMED = 32, 1000, 1024
SAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "min_tokens", "prompt_logprobs", "priority",
)  # fmt: skip
"""Fields that have the same name in `Request`."""


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """The usage so far in every event."""
    include_obfuscation: bool | None = None

    @field_validator("include_obfuscation")
    @classmethod
    def _refuse_obfuscation(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("obfuscation is not supported")
        return value


class ResponseFormat(BaseModel):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @property
    def schema_asked(self) -> dict[str, Any] | bool | None:
        """A JSON schema; True for any object; None for free text. Raises ValueError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return True
        schema = (self.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            raise ValueError("response_format.json_schema has no schema")
        return schema


class Sampling(Body):
    """Fields that both kinds of request share."""

    kind: ClassVar[Kind]
    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, Any] = Field(default_factory=dict, max_length=MOST_TOKENS_NAMED)
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MOST_TOKENS_NAMED)
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    n: int = Field(1, ge=1)
    best_of: int | None = None
    priority: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = None

    @field_validator("stop")
    @classmethod
    def _bound_stops(cls, stop: str | list[str]) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if len(stops) > MOST_STOPS or any(len(one) > LONGEST_STOP for one in stops):
            raise ValueError(
                f"at most {MOST_STOPS} stop strings of {LONGEST_STOP} characters are taken"
            )
        if not all(stops):
            raise ValueError("an empty stop string would end every request at once")
        return stops

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options.include_usage)

    def check(self, *, max_choices: int, max_priority: int) -> None:
        """Raise Refused for more than the server gives to one request."""
        if self.num_prompts * self.n > max_choices:
            asked = f"{self.num_prompts} prompts with n={self.n}"
            raise Refused(400, f"{asked}: ask for at most {max_choices} choices", param="n")
        if self.priority > max_priority:
            asked = f"priority={self.priority} is above {max_priority}"
            raise Refused(400, f"{asked}, the highest that this server gives", param="priority")
        if self.best_of not in (None, self.n):
            asked = f"best_of={self.best_of} with n={self.n} is not supported; give n alone"
            raise Refused(400, asked, param="best_of", code="unsupported_parameter")
        if self.stream and self.prompt_logprobs is not None:
            raise Refused(400, "prompt_logprobs cannot be streamed", param="prompt_logprobs")

    def requests(self, prompts: Sequence[list[int]], context: int) -> list[Request]:
        """`n` requests a prompt. context: tokens of prompt and answer. Raises Refused."""
        raise NotImplementedError

    def requests_of(
        self, prompts: Sequence[list[int]], max_tokens: int | None, context: int, **options: Any
    ) -> list[Request]:
        """`n` requests a prompt, each with a seed of its own where there is one.

        max_tokens: None for as many as the context leaves.
        """
        names = {name: getattr(self, name) for name in SAME}
        seeds = [None if self.seed is None else self.seed + choice for choice in range(self.n)]
        group = uuid4().hex
        try:
            if "json_schema" not in options and self.response_format is not None:
                options["json_schema"] = self.response_format.schema_asked
            return [
                Request(
                    id=uuid4().hex,
                    prompt=prompt,
                    seed=seed,
                    max_tokens=max(1, context - len(prompt)) if max_tokens is None else max_tokens,
                    **(names | options),
                    group=group,
                )
                for prompt in prompts
                for seed in seeds
            ]
        except (ValueError, OverflowError) as error:
            raise bad_request(error, type(self).model_fields, self.prompt_field) from error

    prompt_field: ClassVar[str] = "prompt"
    """Name of the field that holds the prompt."""
