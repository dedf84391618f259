"""Parts of serving that break on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from runtime.serving.model_runner import Part
from runtime.serving.serving_loop import ServingLoop
from tests.helpers.tiny import tiny_tokenizer

POISON = "poison"
"""The label of requests that no step survives."""


class Panic(BaseException):
    """Raised as a panic of the tokenizers library is: by no `Exception`."""


class Mute(Exception):
    """An error whose own text fails."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


ERRORS: tuple[BaseException, ...] = (
    RecursionError("too deep"), OverflowError("too large"), MemoryError(), KeyError("text"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), Panic("unwrap"),
    Mute(), OSError("gone"),
)  # fmt: skip


class Breaking:
    """A tokenizer that raises `error` for the texts and tokens that `breaks` says."""

    def __init__(self, error: BaseException, breaks: Callable[[Any], bool]) -> None:
        self._tokenizer: Any = tiny_tokenizer()
        self._error, self._breaks = error, breaks

    def __call__(self, text: str) -> Any:
        if self._breaks(text):
            raise self._error
        return self._tokenizer(text)

    def decode(self, ids: Sequence[int], **options: Any) -> Any:
        if self._breaks(list(ids)):
            raise self._error
        return self._tokenizer.decode(ids, **options)


def poison(loop: ServingLoop, error: Exception | None = None) -> None:
    """Let every step fail that runs a sequence with the label POISON."""
    run = loop._runner.run
    raised = error or RuntimeError("out of memory")

    def broken(parts: Sequence[Part], renew: Any) -> Any:
        if any(part.sequence.request.label == POISON for part in parts):
            raise raised
        return run(parts, renew)

    loop._runner.run = broken  # type: ignore[method-assign]


def drain(loop: ServingLoop, most: int = 2000) -> dict[str, Any]:
    """Step until all requests have ended; each may end once."""
    found: dict[str, Any] = {}
    for _ in range(most):
        for result in loop.step():
            assert result.id not in found
            found[result.id] = result
        if loop.is_idle:
            return found
    raise AssertionError(f"{len(loop.waiting)} wait and {len(loop.active)} run for ever")
