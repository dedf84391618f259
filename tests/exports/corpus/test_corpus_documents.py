"""Documents of the corpus: cleaning, repeated paragraphs, generated code, pieces, the split."""

import pytest

from exports.corpus.documents import SCRIPTS, Cleaner, Document, is_generated, pieces, tidy

LONG = "This sentence is one of the many sentences that stand in the text of the test. "


def documents(number):
    return [Document(text=f"Document {i}. {LONG}", source=0) for i in range(number)]


def test_a_paragraph_that_was_seen_is_left_out_of_later_documents():
    cleaner = Cleaner("Latin")
    licence = "Licensed under " + LONG
    assert licence.strip() in cleaner.clean(f"{licence}\n\nFirst: {LONG * 2}")
    assert licence.strip() not in cleaner.clean(f"{licence}\n\nSecond: {LONG * 2}")


def test_paragraphs_that_are_not_translated_are_left_out():
    russian = "Это предложение на русском языке, которое остаётся в тексте. " * 3
    cleaned = Cleaner("Cyrillic").clean(f"{LONG}\n\n{russian}\n\nls -l")
    assert LONG.strip() not in cleaned
    assert "русском" in cleaned and "ls -l" in cleaned


def test_a_text_that_is_too_short_is_left_out():
    assert Cleaner("Latin").clean("Hello.") == ""


def test_no_text_contains_the_mark_between_documents():
    assert "<|endoftext|>" not in Cleaner("Latin").clean(f"{LONG * 3}\n<|endoftext|>\n{LONG}")


def test_white_space_is_made_plain():
    assert tidy("a\u00a0b \r\n\r\n\r\n\nc\n") == "a b\n\nc"


@pytest.mark.parametrize(
    ("code", "generated"),
    [("x = 1\n" * 5 + "print(x)", False), ("0x12, 0x34, 0x56,\n" * 9, True), ("a" * 1001, True)],
)
def test_tables_and_embedded_data_count_as_generated(code, generated):
    assert is_generated(code) is generated


def test_pieces_of_a_long_text_end_between_paragraphs_and_lose_nothing():
    text = "\n\n".join(f"Paragraph {i}: {LONG}" for i in range(100))
    parts = list(pieces(text, 1000))
    assert "\n\n".join(parts) == text
    assert all(part.startswith("Paragraph") for part in parts)
    assert max(map(len, parts)) < 1200


def test_about_one_document_of_a_hundred_is_held_out():
    held_out = sum(document.is_held_out(100) for document in documents(5000))
    assert 25 < held_out < 100


def test_other_documents_do_not_change_whether_one_is_held_out():
    few, many = documents(500), documents(700)
    held_out = {document.text for document in many if document.is_held_out(100)}
    assert {d.text for d in few if d.is_held_out(100)} == held_out & {d.text for d in few}


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_every_script_makes_a_cleaner(script):
    assert Cleaner(script).clean(LONG) == ""
