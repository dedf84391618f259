"""Text out of tokens: nothing twice, nothing half, and an end before a stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serving.detokenizer import TextStream
from tests.helpers.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER(text).input_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, stream
    return [*pieces, stream.finish()], stream


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_the_pieces_are_the_text(text: str) -> None:
    pieces, whole = stream(text)
    assert "".join(pieces) == whole.text == TOKENIZER.decode(TOKENIZER(text).input_ids)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, whole = stream(text, tuple(stop))
    found = any(word in text for word in stop)
    assert whole.stopped == found
    assert "".join(pieces) == whole.text
    assert text.startswith(whole.text)
    if found:
        assert text[len(whole.text) :].startswith(tuple(stop))
        assert not any(word in whole.text for word in stop)
    else:
        assert whole.text == text


def test_no_half_character_is_given_out() -> None:
    pieces, whole = stream("é漢🙂")
    assert whole.text == "é漢🙂"
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_given_out_as_what_it_is() -> None:
    half = TOKENIZER("é").input_ids[:1]
    stream = TextStream(TOKENIZER)
    assert stream.push(half[0]) == ""
    assert stream.finish() == "\ufffd"
