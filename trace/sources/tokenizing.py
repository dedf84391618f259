"""Documents as token ids, cut before they are tokenised.

A tokenizer needs a hundred bytes for each character that it reads, so that a document of 40 MB
takes gigabytes, of which 2,048 tokens are kept. Only as long a beginning is read as gives them, and
the same tokens as the whole document: tokens well before the end of a text do not depend on what
follows it.

- Byte-pair merges reach only a few tokens to the right: `MARGIN` tokens more than needed suffice.
- Other models choose the tokens of a word together: the word after the last kept one must have
  ended too.
- Where neither is known, the whole document is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trace.sources.chats import Turn
from trace.sources.documents import Prompt, Tally, Text
from trace.sources.text_files import MOST_CHARACTERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_A_TOKEN = 8
"""First guess: twice what English takes."""
MARGIN = 256
"""Tokens read beyond the last that is kept."""
GROWTH = 4
"""Factor by which the beginning grows where it has too few tokens."""
PLAIN = "plain"
"""The value of --chat_template that joins turns by blank lines."""


class Beginning(NamedTuple):
    """The first tokens of a document."""

    ids: list[int]
    num_cut: int
    has_more: bool


def tokenize(
    texts: Iterable[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    chat_template: bool | str = False,
    answer: bool = False,
    tally: Tally | None = None,
) -> Iterator[Prompt]:
    """Token ids of each document, cut to `max_tokens`; documents without tokens are left out.

    chat_template: True renders chats by the tokenizer's template, a text by that file, and "plain"
    joins their turns. With `answer`, a rendered chat ends with the opening of the assistant's next
    message. Raises ValueError where there is no template, or where it rejects a chat.
    """
    template = _template(tokenizer, chat_template)
    number = 0
    for text in texts:
        is_rendered = not isinstance(text.content, str) and chat_template != PLAIN
        if is_rendered:
            string = _render(text, tokenizer, template, answer)
        else:
            string = _joined(text.content)
        found = beginning(tokenizer, string, max_tokens, add_special_tokens=not is_rendered)
        if found.ids:
            if tally is not None:
                tally.count(found.ids)
            yield Prompt(number, found.ids, text.label, found.num_cut, found.has_more)
            number += 1
        elif tally is not None:
            tally.num_empty += 1


def _joined(content: str | list[Turn]) -> str:
    if isinstance(content, str):
        return content
    return "\n\n".join(turn["content"] for turn in content)


def beginning(
    tokenizer: PreTrainedTokenizerBase, text: str, limit: int, *, add_special_tokens: bool
) -> Beginning:
    """The first `limit` token ids of `text`: exactly those of the whole text, cut."""
    size = CHARACTERS_A_TOKEN * (limit + MARGIN)
    while size < len(text):
        found = tokenizer(text[:size], add_special_tokens=add_special_tokens, verbose=False)
        if _is_settled(tokenizer, found, limit):
            ids = found["input_ids"]
            return Beginning(ids[:limit], len(ids) - limit, True)
        size *= GROWTH
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    has_more = len(ids) > limit and len(text) >= MOST_CHARACTERS
    return Beginning(ids[:limit], max(0, len(ids) - limit), has_more)


def _is_settled(tokenizer: Any, found: Any, limit: int) -> bool:
    """Whether the first `limit` tokens stay as they are, whatever text follows."""
    from tokenizers.models import BPE

    if len(found["input_ids"]) < limit + MARGIN or not getattr(tokenizer, "is_fast", False):
        return False
    if isinstance(tokenizer.backend_tokenizer.model, BPE):
        return True
    words = [word for word in found.word_ids(0)[limit - 1 :] if word is not None]
    return len(set(words)) > 2


def _template(tokenizer: Any, chat_template: bool | str) -> str | None:
    """The template of a file; None for the tokenizer's own. Raises ValueError where there is none.

    Before any text is read: a missing template is no fault of a row.
    """
    if isinstance(chat_template, str) and chat_template != PLAIN:
        if not Path(chat_template).is_file():
            raise ValueError(
                f"--chat_template {chat_template}: there is no such file; give true for the "
                "tokenizer's own template, or plain"
            )
        return Path(chat_template).read_text(encoding="utf-8")
    if chat_template is True and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: give a file with "
            "one, or --chat_template plain to join the turns"
        )
    return None


def _render(text: Text, tokenizer: Any, template: str | None, answer: bool) -> str:
    """A chat as its template writes it. Raises ValueError where it rejects or loses the turns."""
    assert not isinstance(text.content, str)
    try:
        rendered = tokenizer.apply_chat_template(
            text.content, chat_template=template, tokenize=False, add_generation_prompt=answer
        )
    except Exception as error:  # a template can raise anything; what it says is about the turns
        raise ValueError(
            f"{text.label}: the chat template rejects a chat of the roles "
            f"{', '.join(turn['role'] for turn in text.content)!s:.80} ({error!s:.200})"
        ) from error
    if not _shows(rendered, text.content):
        raise ValueError(f"{text.label}: the chat template writes none of a chat's turns")
    return str(rendered)


def _shows(rendered: str, turns: list[Turn]) -> bool:
    starts = [turn["content"].strip()[:32] for turn in turns]
    return any(start in rendered for start in starts if start) or not any(starts)
