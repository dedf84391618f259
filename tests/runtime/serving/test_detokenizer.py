"""Text out of tokens: nothing twice, nothing half, and an end before a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runtime.serving.detokenizer import TextStream
from runtime.serving.request import Request
from runtime.serving.sampling.ends import Ends
from tests.helpers.tiny import EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def stream(
    text: str, stop: tuple[str, ...] = (), *, includes_stop: bool = False, minimum: int = 0
) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop, includes_stop=includes_stop)
    pieces = []
    for count, token in enumerate(TOKENIZER(text).input_ids, start=1):
        pieces.append(stream.push(token, may_stop=count > minimum))
        if stream.stopped:
            return pieces, stream
    return [*pieces, stream.finish()], stream


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_the_pieces_are_the_text(text: str) -> None:
    pieces, whole = stream(text)
    assert "".join(pieces) == whole.text == TOKENIZER.decode(TOKENIZER(text).input_ids)


def first_stop(text: str, stop: list[str], passed: int = 0) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first, spelled out letter by letter."""
    for end in range(passed + 1, len(text) + 1):
        if starts := [end - len(one) for one in stop if text[:end].endswith(one)]:
            return min(starts), end
    return None


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ABC", max_size=30),
    stop=st.lists(st.text("ABC", min_size=1, max_size=4), min_size=1, max_size=3),
    includes_stop=st.booleans(),
    minimum=st.integers(0, 12),
)
def test_the_text_ends_with_the_stop_string_that_is_complete_first(
    text: str, stop: list[str], includes_stop: bool, minimum: int
) -> None:
    pieces, whole = stream(text, tuple(stop), includes_stop=includes_stop, minimum=minimum)
    found = first_stop(text, stop, minimum)
    assert whole.stopped == (found is not None)
    assert "".join(pieces) == whole.text
    assert whole.text == (text if found is None else text[: found[1 if includes_stop else 0]])


class Cut:
    """A tokenizer whose tokens are any pieces of a text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(self.pieces[i] for i in ids)


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
    stop=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_how_a_text_is_cut_into_tokens_makes_no_difference(
    pieces: list[str], stop: list[str]
) -> None:
    text, cut = "".join(pieces), TextStream(Cut(pieces), tuple(stop))
    given_out = [cut.push(i) for i in range(len(pieces)) if not cut.stopped]
    given_out.append(cut.finish())
    found = first_stop(text, stop)
    assert "".join(given_out) == cut.text == (text if found is None else text[: found[0]])


def test_no_half_character_is_given_out() -> None:
    pieces, whole = stream("é漢🙂")
    assert whole.text == "é漢🙂"
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_given_out_as_what_it_is() -> None:
    half = TOKENIZER("é").input_ids[:1]
    stream = TextStream(TOKENIZER)
    assert stream.push(half[0]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("stop", ["\u00e9", "e\u0301"], ids=["composed", "decomposed"])
@pytest.mark.parametrize("said", ["\u00e9", "e\u0301"], ids=["composed", "decomposed"])
def test_a_stop_string_is_found_in_each_form_that_unicode_calls_equal(stop: str, said: str) -> None:
    request = Request(prompt=[1], stop=stop)
    ends = Ends.of(request, TOKENIZER, frozenset())
    pieces, whole = stream(f"caf{said}!", ends.texts)
    assert whole.stopped and whole.text == "".join(pieces) == "caf"


def test_a_stop_string_of_bytes_in_several_tokens_is_found_whole() -> None:
    pieces, whole = stream("ab🙂漢cd", ("🙂漢",))
    assert whole.stopped and whole.text == "ab" and "".join(pieces) == "ab"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Unigrams with a token for each byte, as of SentencePiece, for what has none."""
    byte_tokens = [(f"<0x{value:02X}>", -9.0) for value in range(256)]
    words = [("<unk>", 0.0), ("\u2581", -2.0), ("\u2581a", -1.0), ("b", -1.0), ("c", -1.0)]
    tokenizer = Tokenizer(models.Unigram([*words, *byte_tokens], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab c漢é🙂", max_size=12))
def test_byte_fallback_never_gives_half_a_character(text: str) -> None:
    tokenizer: Any = byte_fallback_tokenizer()
    ids = tokenizer(text).input_ids
    stream = TextStream(tokenizer)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == stream.text == tokenizer.decode(ids)


def test_no_letter_is_lost_where_a_tokenizer_tidies_spaces() -> None:
    """Tidied, "a ' b" is shorter than the "a '" that went before."""
    words = [("<unk>", 0.0), *((f"\u2581{letter}", -1.0) for letter in "ab'.")]
    inner = Tokenizer(models.Unigram(words, unk_id=0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=True
    )
    stream = TextStream(tokenizer)
    pieces = [*map(stream.push, tokenizer("a ' b . a").input_ids), stream.finish()]
    assert "".join(pieces) == stream.text == "a ' b . a"


# ---------------------------------------------------------------------- ends


def ends(**options: Any) -> Ends:
    return Ends.of(Request(prompt=[1], **options), TOKENIZER, frozenset({7}))


def test_a_special_token_as_a_stop_string_is_that_token() -> None:
    special = TOKENIZER.eos_token
    assert ends(stop=[special, "x"]).token_ids == {7, EOS}
    assert ends(stop=[special, "x"]).texts == ("x",)
    with pytest.raises(ValueError, match="holds the special token"):
        ends(stop=f"{special}x")


def test_stop_tokens_end_a_request_even_past_the_end_of_sequence_token() -> None:
    assert ends(stop_token_ids=[9]).token_ids == {7, 9}
    assert ends(stop_token_ids=[9], ignore_eos=True).token_ids == {9}
    assert ends(stop_token_ids=[9]).told_ids == {9}
