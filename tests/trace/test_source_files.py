"""trace.sources: kinds of files, folders and layouts of data sets, and damage to them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from trace.settings import CollectSettings
from trace.sources import Tally, read_texts, text_files
from trace.sources.text_files import split_text


def texts(dataset: Path | str, **options: Any) -> list[tuple[Any, str]]:
    settings = CollectSettings(model="m", dataset=[str(dataset)], out="o", **options)
    return [(text.content, text.label) for text in read_texts(settings)]


ROWS = [{"text": "one"}, {"text": "two"}]
BODIES = {
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "ndjson": "\n".join(json.dumps(row) for row in ROWS),
    "json": json.dumps(ROWS),
    "csv": "text\none\ntwo\n",
    "tsv": "text\none\ntwo\n",
}


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", BODIES)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packing", PACK)
def test_rows_come_from_every_kind_of_file(
    tmp_path: Path, suffix: str, mark: str, end: str, packing: str
) -> None:
    data = (mark + BODIES[suffix].replace("\n", end)).encode()
    path = tmp_path / f"a.{suffix}{packing}"
    path.write_bytes(PACK[packing](data))
    assert texts(path) == [("one", "a"), ("two", "a")]


@pytest.mark.parametrize("body", ['{"data": [{"text": "one"}, {"text": "two"}]}', BODIES["jsonl"]])
def test_a_json_file_may_hold_a_list_under_a_key_or_lines(tmp_path: Path, body: str) -> None:
    (tmp_path / "a.json").write_text(body)
    assert texts(tmp_path / "a.json") == [("one", "a"), ("two", "a")]


def test_cells_of_a_csv_file_stay_text_and_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n007,NA\n"two\nlines, ""quoted""",b\n')
    assert texts(tmp_path / "a.csv", label_column="label") == [
        ("007", "NA"),
        ('two\nlines, "quoted"', "b"),
    ]


@pytest.mark.parametrize("format", ["stream", "file"])
def test_arrow_files_of_both_formats_are_read(tmp_path: Path, format: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    writer = pa.ipc.new_stream if format == "stream" else pa.ipc.new_file
    with writer(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    assert texts(tmp_path / "a.arrow") == [("one", "a"), ("two", "a")]


def test_an_empty_parquet_shard_is_skipped(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "b.parquet")
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").touch()
    assert texts(tmp_path) == [("one", "b"), ("two", "b")]


@pytest.mark.parametrize("separator", ["<|endoftext|>  ", " <|endoftext|>", "<|endoftext|>\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_line_ends_and_blanks_do_not_hide_a_separator(
    tmp_path: Path, separator: str, end: str
) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(f"\ufeffone{end}{separator}{end}two{end}<|endoftext|>".encode())
    assert list(split_text(path)) == ["one\n", "two\n", ""]


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"ab\ncd\xffe", r"byte 0xff at offset 5, in line 2; convert"),
        ("a.txt", "ab".encode("utf-16"), r"byte 0xff at offset 0, in line 1; it looks like UTF-16"),
        ("a.txt", "für".encode()[:2], r"it ends within a character, at offset 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"byte 0xe9 at offset 24, in line 2"),
        ("a.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], "its compression is damaged"),
        ("a.txt.gz", b"no gzip", "its compression is damaged"),
        ("a.txt.xz", b"no xz", "its compression is damaged"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        ("a.jsonl", b"[1, 2]", r"line 1 is no object but \[1, 2\]"),
        ("a.json", b"{", "it is no JSON"),
        ("a.json", b'["a"]', 'entry 1 is no object but "a"'),
        ("a.csv", b"text,label\na,b\nc\n", "line 3 has 1 cells, the header 2"),
        ("a.csv", b"text,text\na,b\n", "names a column twice"),
        ("a.csv", b'text\n"never closed\n', "line 2: unexpected end"),
        ("a.parquet", b"PAR1 not", "Parquet"),
        ("a.arrow", b"not arrow at all", "a.arrow"),
    ],
)
def test_damage_is_named_with_its_place(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        texts(tmp_path / name)
    assert name in str(error.value)


def test_the_place_of_a_bad_byte_is_right_across_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PIECE", 4)
    (tmp_path / "a.txt").write_bytes("aüü\n∑∑\n".encode() + b"\x80")
    with pytest.raises(ValueError, match="byte 0x80 at offset 13, in line 3"):
        texts(tmp_path / "a.txt")


# ---------------------------------------------------------------------- folders


def test_a_folder_is_read_with_all_in_it_and_says_what_it_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.txt", "a/x.txt", "a/deep/y.md", "c.jsonl.gz", ".hidden.txt", ".git/z.txt",
                 "pic.PNG", "other.png", "Makefile", "old.tar.gz", "README.md"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c"}'))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "z.txt").symlink_to(tmp_path / "b.txt")
    assert texts(tmp_path) == [
        ("a/deep/y.md", "a/deep/y"),
        ("a/x.txt", "a/x"),
        ("b.txt", "b"),
        ("c", "c"),
    ]
    [line] = capsys.readouterr().out.splitlines()
    for words in ("read 4 files; skipped", "2 .png", "1 .tar.gz", "1 README.md", "2 hidden",
                  "1 without suffix", "1 broken links", "1 links to folders already read",
                  "1 links to files already read"):  # fmt: skip
        assert words in line


def test_a_saved_data_set_is_read_by_its_split(tmp_path: Path) -> None:
    data = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[1:])})
    data.save_to_disk(tmp_path / "dict")
    data["train"].save_to_disk(tmp_path / "one")
    assert [text for text, _ in texts(tmp_path / "dict")] == ["one", "two"]
    assert [text for text, _ in texts(tmp_path / "dict", split="test")] == ["two"]
    assert [text for text, _ in texts(tmp_path / "one")] == ["one", "two"]
    with pytest.raises(ValueError, match="no split 'dev'; its splits are train, test"):
        texts(tmp_path / "dict", split="dev")


@pytest.mark.parametrize(
    "files",
    [
        {"train": "data/train-00000-of-00001.parquet", "test": "data/test-00000-of-00001.parquet"},
        {"train": "train-00000-of-00001.parquet", "test": "test-00000-of-00001.parquet"},
        {"train": "train/a.parquet", "test": "test/a.parquet"},
    ],
)
def test_a_folder_laid_out_as_on_the_hub_is_read_by_its_split(
    tmp_path: Path, files: dict[str, str]
) -> None:
    for split, name in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Dataset.from_list([{"text": split}]).to_parquet(tmp_path / name)
    assert [text for text, _ in texts(tmp_path)] == ["train"]
    assert [text for text, _ in texts(tmp_path, split="test")] == ["test"]
    with pytest.raises(ValueError, match="dev"):
        texts(tmp_path, split="dev")


@pytest.mark.parametrize("loose", ["de.txt", "de.jsonl", "de.csv", "de.txt.gz"])
def test_loose_files_beside_the_folder_of_a_split_are_not_left_out_in_silence(
    tmp_path: Path, loose: str
) -> None:
    """As `expertflow build` lays out its text: DOMAIN.txt and val/DOMAIN.txt."""
    (tmp_path / "val").mkdir()
    for name in (loose, "dataset_infos.json", "val/de.txt"):
        (tmp_path / name).write_text(name)
    refused = rf"{loose}.* beside .*val.*name the files, {tmp_path}"
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=refused):
            texts(tmp_path, split=split)
    assert [text for text, _ in texts(tmp_path / "val")] == ["val/de.txt"]


def test_a_split_of_files_that_have_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=rf"{path} has no splits: leave --split test out"):
            texts(path, split="test")


def test_a_folder_whose_readme_lists_configs_is_read_by_them(tmp_path: Path) -> None:
    configs = [{"config_name": name, "data_files": f"{name}.parquet"} for name in ("en", "de")]
    front = f"configs:\n  {json.dumps(configs)}"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Words\n")
    for name in ("en", "de"):
        Dataset.from_list([{"text": name}]).to_parquet(tmp_path / f"{name}.parquet")
    assert [text for text, _ in texts(f"{tmp_path}:de")] == ["de"]
    with pytest.raises(ValueError, match=r"en.*de|de.*en"):
        texts(tmp_path)


def test_classes_go_by_their_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "topic": ClassLabel(names=["law", "sport"])})
    rows = {"text": ["a", "b"], "topic": [1, 0]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved", label_column="topic") == [("a", "sport"), ("b", "law")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0)
    with pytest.raises(ValueError, match="a cannot be read"):
        texts(tmp_path)


# ---------------------------------------------------------------------- counts and size


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n\n<|endoftext|>\n")
    settings = CollectSettings(model="m", dataset=[str(tmp_path)], out="o")
    tally = Tally()
    assert len(list(read_texts(settings, tally))) == 1
    assert tally.num_empty == 2


def test_a_huge_line_is_read_in_pieces_and_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 8 << 20
    (tmp_path / "a.txt").write_text("x" * size)
    tracemalloc.start()
    [(whole, _)] = texts(tmp_path / "a.txt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(whole) == size
    assert peak < 2.5 * size, "the pieces, and the text that they make"
    monkeypatch.setattr(text_files, "MOST_CHARACTERS", 3 << 20)
    (tmp_path / "a.txt").write_text("x" * size + "\n<|endoftext|>\ny")
    assert [len(text) for text, _ in texts(tmp_path / "a.txt")] == [3 << 20, 1]
