"""Answers to POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from runtime.server.protocol.answers import FINISH, Answer, Event
from runtime.server.protocol.chat import ChatBody
from runtime.server.protocol.logprobs import of_chat
from runtime.server.protocol.token_text import TokenText
from runtime.server.protocol.tool_calls import Read, Thought, reader_of
from runtime.server.protocol.tool_formats import Call
from runtime.serving.request import Delta, Result


class ChatAnswer(Answer):
    """Messages of the assistant: text, and calls of tools."""

    prefix, chunk = "chatcmpl", "chat.completion.chunk"

    def __init__(
        self,
        body: ChatBody,
        model: str,
        prompts: Sequence[list[int]],
        text: TokenText,
        markers: dict[int, str],
        tool_format: str | None,
    ) -> None:
        """tool_format: in which calls of tools are to be read, None for none; markers: the special
        tokens that tell them.
        """
        super().__init__(body, model, prompts, text)
        self._chat, self._markers = body, {} if tool_format is None else markers
        must_call = body.must_call if body.may_call else None
        self._readers = [reader_of(must_call, tool_format, body.schemas) for _ in range(body.n)]
        self._num_calls = [0] * body.n

    def choice(self, index: int, result: Result) -> Event:
        read = self._read_whole(index, result)
        said = "".join(item for item in read if isinstance(item, str))
        thought = "".join(item.text for item in read if isinstance(item, Thought))
        calls = [item for item in read if isinstance(item, Call)]
        if not self._chat.parallel_tool_calls:
            calls = calls[:1]
        message: Event = {"role": "assistant", "content": said, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message |= {"content": said.strip() or None}
            message |= {"tool_calls": [self._call(call) for call in calls]}
        logprobs = of_chat(result.logprobs, self._text) if self._chat.logprobs else None
        finish = self._finish(result, bool(calls))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def opening(self) -> list[Event]:
        """Who speaks, for each choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._piece(index, delta) for index in range(self._chat.n)]

    def pieces(self, index: int, item: Delta | Result) -> list[Event]:
        reader = self._readers[index]
        if isinstance(item, Result):
            read = reader.finish()
            last = self._told(index, read)
            finish = self._finish(item, self._num_calls[index] > 0)
            return [*last, self._piece(index, {}, finish=finish)]
        told = self._told(index, reader.push(item.text + self._markers.get(item.token_id, "")))
        if item.logprob is not None and self._chat.logprobs:
            told = told or [self._piece(index, {})]
            told[0]["logprobs"] = of_chat([item.logprob], self._text)
        return told

    def extras(self, results: Sequence[Result]) -> Event:
        if self._chat.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": self._prompt_logprobs(results[0])}

    def _read_whole(self, index: int, result: Result) -> Read:
        """What the text says, the special tokens that tell calls included."""
        reader, text = self._readers[index], result.text
        if any(token_id in self._markers for token_id in result.token_ids):
            text = self._text.joined(result.token_ids, self._markers, len(text))
        return [*reader.push(text), *reader.finish()]

    def _told(self, index: int, read: Read) -> list[Event]:
        told = []
        for item in read:
            if isinstance(item, str):
                told.append(self._piece(index, {"content": item}))
            elif isinstance(item, Thought):
                told.append(self._piece(index, {"reasoning_content": item.text}))
            elif self._chat.parallel_tool_calls or not self._num_calls[index]:
                call = {"index": self._num_calls[index]} | self._call(item)
                self._num_calls[index] += 1
                told.append(self._piece(index, {"tool_calls": [call]}))
        return told

    def _piece(self, index: int, delta: Event, finish: str | None = None) -> Event:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _finish(self, result: Result, has_calls: bool) -> str:
        return "tool_calls" if has_calls and result.finish == "stop" else FINISH[result.finish]

    def _call(self, call: Call) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}
