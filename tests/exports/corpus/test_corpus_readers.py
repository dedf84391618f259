"""Readers of the corpus: what is kept of pages, catalogues, dictionaries, records."""

import gzip
import json
import struct

from exports.corpus.domains import ALL_READERS
from exports.corpus.man_pages import man_text
from exports.corpus.markup import html_text, mallard_text


def read(tmp_path, reader, content, name="file"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(ALL_READERS[reader](path))


def test_a_page_keeps_its_text_and_loses_what_frames_it():
    page = "<head><title>T</title></head><nav>menu</nav><p>One\n two&amp;</p><pre>a\n  b</pre>"
    assert html_text(page).split() == ["One", "two&", "a", "b"]
    assert "\n\n" in html_text(page)


def test_indented_lines_of_preformatted_text_stay_as_they_are():
    assert "\n    x = 1\n" in html_text("<pre>def f():\n    x = 1\n</pre>")


def test_a_help_page_loses_its_head_and_its_tags():
    page = "<page><info><desc>gone</desc></info><title>Sound</title><p>Turn <gui>it</gui> up.</p>"
    assert [part for part in mallard_text(page).split("\n\n") if part] == [
        "Sound",
        "Turn it up.",
    ]


def test_a_manual_page_becomes_paragraphs_under_its_headings():
    page = '.TH LS 1\n.SH "SEE ALSO"\n.BR cat (1)\nand\n.I more\\-pages\n.PP\nNext\\fB!\\fP\n'
    assert man_text(page) == "SEE ALSO\n\ncat(1) and more-pages\n\nNext!"


def test_an_example_of_a_manual_page_keeps_its_lines():
    assert man_text(".nf\nint a;\nint b;\n.fi\nText\n") == "int a;\nint b;\n\nText"


def test_a_manual_page_that_only_names_another_has_no_text():
    assert man_text(".so man1/other.1\n") == ""


def catalogue(messages):
    """A compiled catalogue of translations."""
    pairs = [(a.encode(), b.encode()) for a, b in sorted(messages.items())]
    start = 28 + 16 * len(pairs)
    tables, texts = [], b""
    for column in (0, 1):
        for pair in pairs:
            tables.append(struct.pack("<II", len(pair[column]), start + len(texts)))
            texts += pair[column] + b"\0"
    half = 28 + 8 * len(pairs)
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, half, 0, 0)
    return head + b"".join(tables) + texts


def test_translations_come_without_their_originals_and_shortcuts(tmp_path):
    content = catalogue({"": "Content-Type: text/plain; charset=UTF-8\n", "_Open": "_Άνοιγμα"})
    assert read(tmp_path, "messages", content, "a.mo") == ["Άνοιγμα"]


def test_a_dictionary_is_cut_between_entries(tmp_path):
    entries = "".join(f"word{i}\n  meaning {i}\n" for i in range(50))
    documents = read(tmp_path, "dictionary", gzip.compress(entries.encode()), "a.dict.dz")
    assert len(documents) == 2
    assert documents[1].startswith("word40\n  meaning 40")


def test_a_line_of_wordnet_becomes_words_and_gloss(tmp_path):
    line = "00001740 03 n 02 physical_thing 0 entity 0 000 | that which is  \n"
    assert read(tmp_path, "wordnet", line, "data.noun") == [
        "physical thing, entity (noun): that which is"
    ]


def test_metamath_loses_its_proofs(tmp_path):
    (text,) = read(tmp_path, "metamath", "a1i $p |- ( ps -> ph ) $= ( wi ) ABC $.\n")
    assert text.strip() == "a1i $p |- ( ps -> ph ) $."


def test_tagged_words_lose_their_tags(tmp_path):
    assert read(tmp_path, "tagged", "The/at jury/nn said/vbd ,/, yes/rb ./.\n") == [
        "The jury said, yes."
    ]


def test_a_conversation_has_a_topic_and_two_speakers(tmp_path):
    def turn(who, text):
        return [{"sender": who, "text": text}]

    turns = [turn("x", "Hi"), turn("y", "Hello"), turn("x", "Tea?"), turn("y", "Yes")]
    chats = {"1": {"prompt": "Tea", "messages": turns}, "2": {"messages": turns[:2]}}
    assert read(tmp_path, "chats", json.dumps(chats)) == [
        "Topic: Tea\nA: Hi\nB: Hello\nA: Tea?\nB: Yes"
    ]


def test_poems_come_with_title_and_author(tmp_path):
    poem = {"title": "春", "author": "孟", "paragraphs": ["春眠", "處處"]}
    other = {"title": "none", "paragraphs": []}
    assert read(tmp_path, "poems", json.dumps([poem, other])) == ["春 孟\n春眠\n處處"]


def test_facts_of_a_country_become_lines(tmp_path):
    facts = {"People": {"Language": {"text": "R&amp;D"}, "Age": {"text": "30"}}}
    assert read(tmp_path, "facts", json.dumps(facts)) == ["\nPeople\nLanguage: R&D\nAge: 30"]


def test_text_in_an_old_encoding_is_read_as_latin_1(tmp_path):
    assert read(tmp_path, "plain", "Größe".encode("latin-1")) == ["Größe"]
