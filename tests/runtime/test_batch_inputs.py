"""What a batch reads: every kind of file, whatever it is packed in, and no option by mistake."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.batch.survey import Survey, survey, unchanged
from runtime.serving.batch.columns import ELSEWHERE, OPTIONS, misspelt
from runtime.serving.batch.files import keep_stdin
from runtime.serving.batch.prompts import to_request
from runtime.serving.batch.rows import Row, rows_of

PROMPTS = [{"prompt": "ein Märchen"}, {"prompt": "two", "max_tokens": 3}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PROMPTS)
FILES = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "lines.json": LINES,
    "list.json": json.dumps(PROMPTS, ensure_ascii=False),
    "rows.csv": 'prompt,max_tokens\r\n"ein Märchen",\r\ntwo,3\r\n',
    "rows.tsv": "prompt\tmax_tokens\nein Märchen\t\ntwo\t3\n",
}


def data_of(path: Path, **options: Any) -> list[Any]:
    return [row.data for row in rows_of(str(path), "train", **options)]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(name: str, mark: str, tmp_path: Path) -> None:
    assert data_of(written(tmp_path / name, mark + FILES[name])) == PROMPTS


@pytest.mark.parametrize(("suffix", "pack"), [
    (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
])  # fmt: skip
def test_packed_files_are_read_and_damaged_ones_named(
    suffix: str, pack: Any, tmp_path: Path
) -> None:
    packed = pack(LINES.encode())
    assert data_of(written(tmp_path / f"rows.jsonl{suffix}", packed)) == PROMPTS
    assert data_of(written(tmp_path / "unnamed.jsonl", packed)) == PROMPTS
    cut = written(tmp_path / f"cut.jsonl{suffix}", packed[:-9])
    with pytest.raises(ValueError, match=rf"{cut} is damaged or cut off"):
        data_of(cut)


def test_blank_lines_are_no_rows_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '\n{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    assert [*rows_of(str(path), "train")] == [
        Row("line 2", {"prompt": "a"}), Row("line 5", {"prompt": "b"}),
    ]  # fmt: skip
    assert data_of(written(tmp_path / "a.txt", "one\r\n\r\ntwo\n")) == [
        {"prompt": "one"}, {"prompt": "two"},
    ]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), [
    (b'{"prompt": "a"},', "not JSON"),
    (b'{"prompt": "a",}', "not JSON"),
    (b'{"prompt": "\xff"}', "byte 13 of the line is not UTF-8"),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' comes twice"),
    (b"[" * 100_000, "cannot be read"),
])  # fmt: skip
def test_a_bad_line_is_that_rows_error(line: bytes, reason: str, tmp_path: Path) -> None:
    rows = b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n'
    first, bad, last = rows_of(str(written(tmp_path / "rows.jsonl", rows)), "train")
    assert (first.data, last.data) == ({"prompt": "a"}, {"prompt": "b"})
    assert bad.place == "line 2" and isinstance(bad.data, ValueError)
    assert reason in str(bad.data)


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("rows.jsonl", '[\n{"prompt": "a"}\n]', "--format json"),
    ("rows.jsonl", '[{"prompt": "a"}]', "--format json"),
    ("rows.json", '[{"prompt": "a"},]', "rows.json is not JSON"),
    ("rows.csv", "prompt,prompt\na,b\n", "names a column twice"),
    ("rows.csv", 'prompt\n"a', "rows.csv, line"),
    ("rows.csv", b"prompt\n\xff\n", "not UTF-8"),
    ("rows.jsonl", '{"prompt": "a"}'.encode("utf-16"), "convert it to UTF-8"),
    ("rows.dat", "{}", "--format"),
    ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd1234", "unpack it first"),
])  # fmt: skip
def test_a_file_that_is_something_else_is_refused_by_name(
    name: str, content: str | bytes, reason: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(ValueError, match=reason) as refused:
        data_of(path)
    assert name in str(refused.value)


def test_a_table_line_of_another_length_is_that_rows_error(tmp_path: Path) -> None:
    rows = data_of(written(tmp_path / "rows.csv", "prompt,seed\na,1\nb\nc,2\n"))
    assert rows[::2] == [{"prompt": "a", "seed": 1}, {"prompt": "c", "seed": 2}]
    assert "1 cells, but the header 2" in str(rows[1])


def test_a_file_that_does_not_say_what_it_is_can_be_told(tmp_path: Path) -> None:
    assert data_of(written(tmp_path / "rows.dat", LINES), format="jsonl") == PROMPTS


def test_a_directory_that_datasets_saved_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"prompt": "a"}])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "several")
    assert data_of(tmp_path / "one") == data_of(tmp_path / "several") == [{"prompt": "a"}]
    with pytest.raises(ValueError, match="cannot be read"):
        [*rows_of(str(tmp_path / "several"), "nonsense")]


def test_standard_input_can_be_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(LINES.encode()))))
    kept = keep_stdin(tmp_path)
    for _ in range(2):
        assert data_of(kept, format="jsonl") == PROMPTS


# ---------------------------------------------------------------------- names of columns


def surveyed(*rows: Any, ignore: tuple[str, ...] = ()) -> Survey:
    return survey([Row(f"line {at}", row) for at, row in enumerate(rows, 1)], [*ignore])


@pytest.mark.parametrize(("name", "meant"), [
    ("max_token", "max_tokens"), ("maxTokens", "max_tokens"), ("temprature", "temperature"),
    ("Prompt", "prompt"), ("topp", "top_p"), ("max_new_tokens", "max_tokens"),
    ("message", "messages"), ("stop_sequences", "stop"), ("labels", "label"),
])  # fmt: skip
def test_a_misspelt_option_stops_the_batch_before_the_model_is_loaded(
    name: str, meant: str
) -> None:
    with pytest.raises(ValueError, match=f"line 2: '{name}' is no option.*did you mean '{meant}'"):
        surveyed({"prompt": "a"}, {"prompt": "a", name: 1})
    assert surveyed({"prompt": "a", name: 1}, ignore=(name,)).num_rows == 1


def test_other_columns_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    surveyed(*[{"prompt": "a", "answer": 1, "prompt_id": "x", "source": None}] * 3)
    said = capsys.readouterr().err
    assert (
        said == "columns that are not read: answer (3 rows), prompt_id (3 rows), source (3 rows)\n"
    )


def test_known_options_are_no_mistakes() -> None:
    assert not any(misspelt(name) for name in OPTIONS)
    assert not set(ELSEWHERE) & set(OPTIONS)


def test_ids_that_come_twice_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    surveyed({"prompt": "a", "id": 7}, {"prompt": "b", "id": "7"}, {"prompt": "c", "id": 7})
    assert "1 rows have the id of an earlier row: 7 in line 1 and line 3" in capsys.readouterr().err
    line = {"custom_id": "x", "url": "/v1/completions", "body": {}}
    with pytest.raises(ValueError, match='line 2: the custom_id "x" is that of line 1 too'):
        surveyed(line, line)


def test_a_data_set_that_changes_between_two_readings_is_noticed() -> None:
    rows = [Row("line 1", {"prompt": "a"}), Row("line 2", ValueError("not JSON"))]
    digest = survey(rows, []).digest
    assert [*unchanged(rows, digest)] == rows
    with pytest.raises(ValueError, match="has changed while it was read"):
        list(unchanged([rows[0], Row("line 2", {"prompt": "b"})], digest))


def test_a_rows_own_settings_go_before_the_batchs() -> None:
    row = {"prompt": "a", "temperature": 1, "stop": "x", "seed": 3}
    request = to_request(row, "7", None, {"temperature": 0.5, "max_tokens": 4, "stop": ()})
    assert (request.id, request.temperature, request.max_tokens) == ("7", 1, 4)
    assert (request.stop, request.seed) == (("x",), 3)
