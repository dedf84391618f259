"""Jobs: what a row asks for, and the line that its results make."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.batch.survey import is_openai
from runtime.serving.batch.prompts import to_request
from runtime.serving.batch.rows import Row
from runtime.serving.batch.settings import BatchSettings
from runtime.serving.request import Request, Result

if TYPE_CHECKING:
    from runtime.batch.openai_lines import OpenAILines

DEFAULTS = ("max_tokens", "temperature", "top_p")


class Outcome(NamedTuple):
    """The line of a row, and the error in it, if there is one."""

    line: dict[str, Any]
    error: str = ""


class Job(NamedTuple):
    """The requests of a row, and the outcome that their results make."""

    requests: list[Request]
    outcome: Callable[[list[Result]], Outcome]


class Jobs:
    """Makes jobs of rows."""

    def __init__(self, settings: BatchSettings, tokenizer: Any, *, has_openai: bool) -> None:
        """Raises ValueError where OpenAI's lines cannot be read."""
        self._settings, self._tokenizer = settings, tokenizer
        self._template = settings.read_template()
        self._openai = _openai_lines(settings, tokenizer, self._template) if has_openai else None
        self._defaults: dict[str, Any] = {name: getattr(settings, name) for name in DEFAULTS}
        self._defaults["stop"] = tuple(settings.stop)

    def of(self, index: int, row: Row) -> Job | Outcome:
        """The job of a row, or the outcome of one that makes none."""
        seed = self._settings.seed + index
        if isinstance(row.data, dict) and is_openai(row.data):
            assert self._openai is not None
            requests, answer, refusal = self._openai.read(row.data, seed)
            if refusal is not None:
                return Outcome(*refusal)
            assert answer is not None
            return Job(requests, lambda results: Outcome(*answer(results)))
        head = {"index": index} | _ids(row)
        try:
            if isinstance(row.data, ValueError):
                raise row.data
            request = to_request(
                row.data, str(index), self._tokenizer, self._defaults | {"seed": seed},
                self._template,
            )  # fmt: skip
        except ValueError as error:
            return _failed(head | {"place": row.place}, str(error))
        return Job([request], lambda results: _plain(head, request, results[0]))


def _openai_lines(settings: BatchSettings, tokenizer: Any, template: str | None) -> OpenAILines:
    try:
        from runtime.batch.openai_lines import OpenAILines
    except ModuleNotFoundError as missing:
        raise ValueError(
            f"lines of OpenAI's batch API need {missing.name}: install moe-expertflow[serve]"
        ) from missing
    return OpenAILines(settings, tokenizer, template)


def _ids(row: Row) -> dict[str, Any]:
    data = row.data if isinstance(row.data, dict) else {}
    return {key: data[key] for key in ("id", "custom_id") if data.get(key) is not None}


def _failed(head: dict[str, Any], error: str) -> Outcome:
    return Outcome(head | {"error": error}, error)


def _plain(head: dict[str, Any], request: Request, result: Result) -> Outcome:
    if result.finish not in ("stop", "length"):
        return _failed(head, result.error or f"the request was {result.finish}")
    line = head | {
        "text": result.text,
        "finish_reason": result.finish,
        "prompt_tokens": result.num_prompt,
        "completion_tokens": len(result.token_ids),
    }
    if request.logprobs is not None:
        line["token_ids"] = list(result.token_ids)
        line["logprobs"] = [one._asdict() for one in result.logprobs]
    if request.prompt_logprobs is not None:
        line["prompt_logprobs"] = [one and one._asdict() for one in result.prompt_logprobs]
    return Outcome(line)
