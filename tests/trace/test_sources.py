"""trace.sources: documents from files, folders and data sets, with their labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.helpers.tiny import tiny_tokenizer
from trace.settings import CollectSettings
from trace.sources import read_texts, tokenize

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def texts(*dataset: Path | str, **options: Any) -> list[tuple[Any, str]]:
    settings = CollectSettings(model="m", dataset=[str(d) for d in dataset], out="o", **options)
    return [(text.content, text.label) for text in read_texts(settings)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_separator_lines_divide_a_text_file_and_blank_documents_are_left_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "poems.txt"
    path.write_text("one\ntwo\n<|endoftext|>\n \n<|endoftext|>\nthree <|endoftext|>\n")
    assert texts(path) == [("one\ntwo\n", "poems"), ("three <|endoftext|>\n", "poems")]


def test_a_text_file_without_separators_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "essay.txt").write_text("first\n\nsecond\n")
    assert texts(tmp_path / "essay.txt") == [("first\n\nsecond\n", "essay")]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_give_a_column_and_a_label(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": "a", "lang": "en"}, {"body": "", "lang": "en"}, {"body": "b", "lang": "de"}]
    path = write_rows(tmp_path / f"rows.{suffix}", rows)
    assert texts(path, column="body") == [("a", "rows"), ("b", "rows")]
    assert texts(path, column="body", label_column="lang") == [("a", "en"), ("b", "de")]


def test_a_folder_is_its_files_in_alphabetical_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("from b")
    write_rows(tmp_path / "a.jsonl", [{"text": "from a"}])
    write_rows(tmp_path / "c.parquet", [{"text": "from c"}])
    (tmp_path / "README.md").write_text("not data")
    assert texts(tmp_path) == [("from a", "a"), ("from b", "b"), ("from c", "c")]


def test_a_missing_column_is_named_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "a", "lang": "en"}])
    with pytest.raises(
        ValueError,
        match=r"rows.jsonl: no column 'text' .* its columns are body, lang: give --column",
    ):
        texts(path)
    with pytest.raises(ValueError, match="no column 'domain'; its columns are body, lang"):
        texts(path, column="body", label_column="domain")


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    for absent in ("absent.jsonl", "absent"):
        with pytest.raises(ValueError, match=rf"{absent}: there is no such file or folder"):
            texts(tmp_path / absent)
    with pytest.raises(ValueError, match=r"a.png: it is not one of the known kinds"):
        texts(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"has no .txt, .md, .jsonl, .*.arrow files"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["bad.txt", "bad.jsonl", "bad.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=name):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_file_has_no_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert texts(tmp_path / name) == []


def test_a_hub_name_may_carry_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((arguments, options))
        return [{"text": "a"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts("org/corpus:v2", "plain", split="test", streaming=True) == [
        ("a", "org/corpus:v2"),
        ("a", "plain"),
    ]
    options = {"split": "test", "streaming": True}
    assert calls == [(("org/corpus", "v2"), options), (("plain", None), options)]


def test_chats_are_rendered_with_the_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    settings = CollectSettings(model="m", dataset=[str(path)], out="o", chat_template=True)
    for answer, end in ((False, ""), (True, "[assistant]")):
        [prompt] = tokenize(
            read_texts(settings), tokenizer, max_tokens=99, chat_template=True, answer=answer
        )
        assert tokenizer.decode(prompt.ids) == f"[user]hi[assistant]ho{end}"


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    settings = CollectSettings(model="m", dataset=[str(path)], out="o", chat_template=True)
    with pytest.raises(ValueError, match="has no chat template"):
        list(tokenize(read_texts(settings), tiny_tokenizer(), max_tokens=9, chat_template=True))


def test_a_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [{"text": CHAT}])
    settings = CollectSettings(model="m", dataset=[str(path)], out="o")
    with pytest.raises(ValueError, match="rows are chats, not text; give --chat_template true"):
        list(tokenize(read_texts(settings), tiny_tokenizer(), max_tokens=9))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"max_tokens": 0}, "max_tokens"), ({"generate": -1}, "generate"), ({"dataset": []}, "names")],
)
def test_settings_that_cannot_work_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollectSettings(**{"model": "m", "dataset": ["d"], "out": "o"} | option)
