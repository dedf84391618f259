"""The detokenizer: text out of tokens as they come, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""The text of a byte-level tokenizer for a character whose bytes are incomplete."""


class TextStream:
    """Turns one request's tokens into text; the pieces joined are the whole text.

    A piece is held back while it ends in half a character, or in what may become a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._shown, self._read = 0, 0
        self._held = ""
        self.text = ""
        self.stopped = False
        """True once a stop string appeared; the text ends before it."""

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is certain now."""
        self._ids.append(token_id)
        new = self._decode(self._shown, len(self._ids))
        if self._tokenizer is None or new.endswith(UNFINISHED):
            return ""
        piece = new[len(self._decode(self._shown, self._read)) :]
        self._shown, self._read = self._read, len(self._ids)
        return self._release(self._held + piece)

    def finish(self) -> str:
        """The end of the text: whatever was held back."""
        if self.stopped or self._tokenizer is None:
            return ""
        before = self._decode(self._shown, self._read)
        piece = self._release(self._held + self._decode(self._shown, len(self._ids))[len(before) :])
        held, self._held = self._held, ""
        return piece + self._give(held)

    def _decode(self, start: int, stop: int) -> str:
        if self._tokenizer is None or start == stop:
            return ""
        text: str = self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)
        return text

    def _release(self, text: str) -> str:
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._give(text[: min(found)])
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return self._give(text[: len(text) - keep])

    def _give(self, piece: str) -> str:
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
