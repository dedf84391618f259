"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from runtime.server.errors import Refused, bad_request
from runtime.server.protocol.fields import report
from runtime.server.protocol.sampling import Kind, Sampling
from runtime.server.protocol.tool_choice import (
    NamedChoice,
    Tool,
    ToolChoice,
    function_named,
    schema_of_calls,
)
from runtime.serving.chat import RENDERED, render_chat, template_of
from runtime.serving.request import Request


class Conversation(Sampling):
    """Messages, and how the chat template shows them."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    prompt_field: ClassVar[str] = "messages"

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the template shows."""
        return [tool.rendered for tool in self.tools] or None

    def rendered(self, tokenizer: Any, template: str | None) -> list[int]:
        """The prompt's token ids. template: in place of the model's own. Raises Refused."""
        variables = dict(self.chat_template_kwargs)
        given = {name: getattr(self, name) for name in RENDERED}
        variables |= {name: value for name, value in given.items() if value is not None}
        try:
            if self.add_special_tokens:
                raise ValueError("add_special_tokens: the chat template writes them itself")
            source = template_of(tokenizer, template, self.shown_tools)
            if self.reasoning_effort is not None:
                if "reasoning_effort" not in source:
                    raise ValueError("reasoning_effort: the model's chat template does not read it")
                variables["reasoning_effort"] = self.reasoning_effort
            unread = [name for name in self.chat_template_kwargs if name not in source]
            report([f"chat_template_kwargs.{name}" for name in unread])
            return render_chat(tokenizer, self.messages, template, self.shown_tools, **variables)
        except (ValueError, RecursionError) as error:
            raise bad_request(error, type(self).model_fields, self.prompt_field) from error


class ChatBody(Conversation):
    """A conversation to answer."""

    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    echo: bool = False
    kind: ClassVar[Kind] = "chat.completion"

    @property
    def must_call(self) -> str | None:
        """The name of the function that has to be called, "" for any, None where none has to."""
        if isinstance(self.tool_choice, NamedChoice):
            return self.tool_choice.function.name
        return "" if self.tool_choice == "required" else None

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """Of the tools' arguments, by name."""
        return {tool.function.name: tool.function.schema_of_arguments for tool in self.tools}

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        return super().shown_tools if self.may_call else None

    @property
    def ignored(self) -> list[str]:
        """`strict` holds where a call has to be made, which the model is then held to."""
        is_strict = any(tool.function.strict for tool in self.tools)
        freely = ["tools.function.strict"] if is_strict and self.must_call is None else []
        return super().ignored + freely

    def check(self, *, max_choices: int, max_priority: int) -> None:
        super().check(max_choices=max_choices, max_priority=max_priority)
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.echo:
            asked = "echo=True is not supported for chats"
            raise Refused(400, asked, param="echo", code="unsupported_parameter")
        if self.must_call is not None and not self.tools:
            raise Refused(400, "tool_choice asks for a call, but there are no tools", param="tools")
        has_form = self.response_format is not None and self.response_format.type != "text"
        if self.may_call and has_form:
            asked = "response_format does not go with tools; send tool_choice='none'"
            raise Refused(400, asked, param="response_format")
        if self.must_call is not None and self.logprobs:
            asked = "logprobs do not go with a tool_choice that asks for a call"
            raise Refused(400, asked, param="logprobs")

    def requests(self, prompts: Sequence[list[int]], context: int) -> list[Request]:
        given = (self.max_completion_tokens, self.max_tokens)
        max_tokens = next((one for one in given if one is not None), None)
        options: dict[str, Any] = {}
        try:
            if self.must_call:
                function = function_named(self.tools, self.must_call)
                options["json_schema"] = function.schema_of_arguments
            elif self.must_call is not None:
                most = None if self.parallel_tool_calls else 1
                options["json_schema"] = schema_of_calls(self.tools, most)
        except ValueError as error:
            raise bad_request(error, type(self).model_fields, "tool_choice") from error
        options["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return self.requests_of(prompts, max_tokens, context, **options)
