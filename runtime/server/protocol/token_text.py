"""The bytes and the text of single tokens, parts of characters included."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

UNFINISHED = "\ufffd"
SPACE = "\u2581"
"""What SentencePiece writes for a space."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Reads a vocabulary: byte-level tokens, SentencePiece with byte fallback, others."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self._added = {token_id: token.content for token_id, token in added.items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        state = b"" if decoder is None else decoder.__getstate__()
        self._byte_level = b'"ByteLevel"' in state
        self._pieces = b"ByteFallback" in state or b"Metaspace" in state or SPACE.encode() in state
        self._known: dict[int, bytes | None] = {}

    def bytes_of(self, token_id: int) -> bytes | None:
        """What the token adds to a text's bytes; None where the tokenizer does not say."""
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def shown(self, token_id: int) -> str:
        """The token's text, with U+FFFD for parts of a character."""
        known = self.bytes_of(token_id)
        return self._decoded(token_id) if known is None else known.decode("utf-8", "replace")

    def named(self, token_id: int) -> str:
        """The token's text; the bytes in OpenAI's notation for parts of a character."""
        known = self.bytes_of(token_id)
        if known == b"":
            return self._decoded(token_id) or f"token_id:{token_id}"
        try:
            return self._decoded(token_id) if known is None else known.decode()
        except UnicodeDecodeError:
            assert known is not None
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)

    def lead(self, token_id: int) -> str:
        """The space that a text that goes on with this token begins with, where decoding strips it:
        SentencePiece leaves it out at the beginning of what is decoded.
        """
        known = self.bytes_of(token_id)
        alone = self._tokenizer.decode([token_id], skip_special_tokens=True)
        return " " if known == f" {alone}".encode() else ""

    def joined(self, token_ids: Sequence[int], marks: Mapping[int, str], most: int) -> str:
        """The text of tokens, with those special tokens that are `marks`.

        most: characters beside the marks, as a stop string may end the text before its tokens.
        """
        text, since = "", 0
        for at, token_id in enumerate([*token_ids, -1]):
            if token_id in marks or at == len(token_ids):
                between = list(token_ids[since:at])
                said = self._tokenizer.decode(between, skip_special_tokens=True)[:most]
                text, since, most = text + said + marks.get(token_id, ""), at + 1, most - len(said)
        return text

    def _decoded(self, token_id: int) -> str:
        text: str = self._tokenizer.decode([token_id])
        return text

    def _read(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the model's vocabulary is larger than the tokenizer's
            return b""
        if self._byte_level and all(char in BYTES for char in token):
            return bytes(BYTES[char] for char in token)
        if self._pieces:
            single = _BYTE.fullmatch(token)
            return bytes([int(single[1], 16)]) if single else token.replace(SPACE, " ").encode()
        text = self._decoded(token_id)
        return None if UNFINISHED in text else text.encode()


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + at): byte for at, byte in enumerate(others)
    }


BYTES = _bytes_of_characters()
