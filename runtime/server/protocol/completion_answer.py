"""Answers to POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.server.protocol.answers import FINISH, Answer, Event
from runtime.server.protocol.completion import CompletionBody
from runtime.server.protocol.logprobs import Offsets, of_completion, trimmed
from runtime.server.protocol.token_text import TokenText
from runtime.serving.request import Delta, Logprob, Result


class CompletionAnswer(Answer):
    """Texts, after their prompts where these are to be echoed."""

    prefix, chunk = "cmpl", "text_completion"

    def __init__(
        self,
        body: CompletionBody,
        model: str,
        prompts: Sequence[list[int]],
        text: TokenText,
        tokenizer: Any,
    ) -> None:
        super().__init__(body, model, prompts, text)
        self._completion, self._tokenizer = body, tokenizer
        self._offsets: dict[int, Offsets] = {}
        self._leads: dict[int, str] = {}
        """What is still to come before the text of each choice that has begun."""
        self._echoed: set[int] = set()

    def choice(self, index: int, result: Result) -> Event:
        echo, asked = self._completion.echo, self._completion.logprobs
        logprobs: list[Logprob | None] = [*result.logprobs]
        ids = ids_said = list(result.token_ids)
        if echo:
            logprobs = [trimmed(one, asked or 0) for one in result.prompt_logprobs] + logprobs
            ids = self._prompt_ids(index) + ids
        extras = {}
        if self._completion.prompt_logprobs is not None:
            extras["prompt_logprobs"] = self._prompt_logprobs(result)
        return {
            "index": index,
            "text": (self._prompt_text(index) if echo else "") + self._led(ids_said, result.text),
            "logprobs": None if asked is None else self._logprobs(index, logprobs, ids),
            "finish_reason": FINISH[result.finish],
        } | extras

    def pieces(self, index: int, item: Delta | Result) -> list[Event]:
        opening = []
        if self._completion.echo and index not in self._echoed:
            self._echoed.add(index)
            opening = [self._piece(index, self._prompt_text(index), None, None)]
        if isinstance(item, Result):
            return [*opening, self._piece(index, "", None, FINISH[item.finish])]
        text = self._led_piece(index, item)
        if not text and item.logprob is None:
            return opening
        logprobs = (
            None if item.logprob is None else self._logprobs(index, [item.logprob], [item.token_id])
        )
        return [*opening, self._piece(index, text, logprobs, None)]

    def _led(self, ids: Sequence[int], text: str) -> str:
        """The text of a choice, which goes on from its prompt."""
        return self._text.lead(ids[0]) + text if text else text

    def _led_piece(self, index: int, delta: Delta) -> str:
        """The same of its pieces."""
        if index not in self._leads:
            self._leads[index] = self._text.lead(delta.token_id)
        if not delta.text:
            return ""
        lead, self._leads[index] = self._leads[index], ""
        return lead + delta.text

    def _piece(self, index: int, text: str, logprobs: Any, finish: str | None) -> Event:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(
        self, index: int, logprobs: Sequence[Logprob | None], ids: Sequence[int]
    ) -> dict[str, Any]:
        """The log-probabilities of one choice's newest tokens."""
        if index not in self._offsets:
            lead = "" if self._completion.echo or not ids else self._text.lead(ids[0])
            self._offsets[index] = Offsets(self._tokenizer, lead)
        offsets = self._offsets[index]
        return of_completion(logprobs, ids, offsets.take(ids), self._text)

    def _prompt_ids(self, index: int) -> list[int]:
        return self._prompts[index // self._completion.n]

    def _prompt_text(self, index: int) -> str:
        """The prompt as it was sent, or the text of its tokens."""
        given = self._completion.prompt[index // self._completion.n]
        if isinstance(given, str):
            return given
        text: str = self._tokenizer.decode(given, skip_special_tokens=True)
        return text
