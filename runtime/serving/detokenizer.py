"""The detokenizer: text out of tokens as they come, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""The text of a byte-level tokenizer for a character whose bytes are incomplete."""


class TextStream:
    """Turns one request's tokens into text; the pieces joined are the whole text.

    A piece is held back while it ends in half a character, or in what may become a stop string.
    Of several stop strings that one counts that is complete first, and of those that end together
    the longest: how text is cut into tokens makes no difference.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        includes_stop: bool = False,
        shows_special: bool = False,
    ) -> None:
        """includes_stop: the text ends with the stop string, rather than before it.
        shows_special: special tokens have a text too.
        """
        self._tokenizer, self._shows_special = tokenizer, shows_special
        self._stop, self._includes_stop = stop, includes_stop
        self._ids: list[int] = []
        self._shown, self._read = 0, 0
        self._held, self._passed = "", 0
        """Text that is held back, and how much of it no stop string may end in."""
        self.text = ""
        self.stopped = False
        """True once a stop string appeared."""

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Take the next token; returns the text that is certain now.

        may_stop: whether a stop string counts that this token completes.
        """
        self._ids.append(token_id)
        if self._tokenizer is None:
            return ""
        new = self._decode(self._shown, len(self._ids))
        if new.endswith(UNFINISHED):
            return ""
        piece = new[len(self._decode(self._shown, self._read)) :]
        self._shown, self._read = self._read, len(self._ids)
        return self._release(piece, may_stop=may_stop)

    def finish(self, *, may_stop: bool = True) -> str:
        """The end of the text: whatever was held back."""
        if self.stopped or self._tokenizer is None:
            return ""
        before = self._decode(self._shown, self._read)
        piece = self._decode(self._shown, len(self._ids))[len(before) :]
        released = self._release(piece, may_stop=may_stop)
        held, self._held = self._held, ""
        return released + self._give(held)

    def _decode(self, start: int, stop: int) -> str:
        if start == stop:
            return ""
        text: str = self._tokenizer.decode(
            self._ids[start:stop],
            skip_special_tokens=not self._shows_special,
            clean_up_tokenization_spaces=False,  # it would change text that was given out already
        )
        return text

    def _release(self, piece: str, *, may_stop: bool) -> str:
        text = self._held + piece
        if not may_stop:
            self._passed = len(text)
        found = [span for stop in self._stop if (span := _find(text, stop, self._passed))]
        if found:
            end, start = min(found)
            self.stopped, self._held = True, ""
            return self._give(text[: end if self._includes_stop else start])
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        given = len(text) - keep
        self._held, self._passed = text[given:], max(0, self._passed - given)
        return self._give(text[:given])

    def _give(self, piece: str) -> str:
        self.text += piece
        return piece


def _find(text: str, stop: str, passed: int) -> tuple[int, int] | None:
    """End and start of the first `stop` that ends beyond the `passed` first characters."""
    start = text.find(stop, max(0, passed - len(stop) + 1))
    return None if start < 0 else (start + len(stop), start)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
