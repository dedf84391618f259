"""`python -m runtime.batch`: one line an input, whatever happens in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from routing.cli import run
from routing.shards import PROMPT, TraceReader
from runtime.batch.command import PROG, main
from runtime.batch.course import PARTS, Moment, mb_per_token, thinned, tokens_per_s
from runtime.serving import serve as feed
from runtime.serving.batch.journal import Journal
from runtime.serving.batch.rows import rows_of
from runtime.serving.batch.settings import BatchSettings
from tests.helpers.serving import greedy
from tests.helpers.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
ROWS: list[Any] = [
    {"prompt": "alpha", "max_tokens": 9},
    {"prompt": "b"},
    {"prompt": "gamma delta", "max_tokens": 2},
    {"prompt": "the end", "temperature": 0.9},
]


@pytest.fixture
def batch(tiny_directory: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """`batch(rows, **settings)` runs the command and returns the file it wrote."""

    def start(rows: list[Any], **options: Any) -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        dataset, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
        dataset.write_text("\n".join(lines) + "\n")
        common: dict[str, Any] = {"memory": "0.5", "max_tokens": 6, "context": 64, "batch": 2}
        model = str(tiny_directory("olmoe"))
        main(BatchSettings(model=model, dataset=str(dataset), out=out, **(common | options)))
        return out

    return start


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_there_is_one_line_an_input_in_their_order(batch: Callable[..., Path]) -> None:
    out = read(batch(ROWS))
    assert [line["index"] for line in out] == [0, 1, 2, 3]
    tokenizer, model = tiny_tokenizer(), tiny_model("olmoe")
    for row, line in list(zip(ROWS, out, strict=True))[:3]:
        tokens = greedy(model, tokenizer(row["prompt"]).input_ids, row.get("max_tokens", 6))
        assert line["text"] == tokenizer.decode(list(tokens), skip_special_tokens=True)


def test_bad_rows_are_reported_and_not_fatal_and_the_exit_code_tells(
    batch: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["not json", "[1]", {}, {"prompt": "a", "top_p": 2}, {"prompt": "a", "max_tokens": "9"}]
    bad += [{"prompt": "a", "max_tokens": 900}, {"messages": [{"role": "user", "content": "a"}]}]
    bad += ['{"prompt": "a", "prompt": "b"}', {"prompt": "a", "messages": []}]
    with pytest.raises(SystemExit) as stopped:
        batch([ROWS[0], *bad, ROWS[1]])
    assert stopped.value.code == 3
    out = read(tmp_path / "out.jsonl")
    assert ["error" in line for line in out] == [False, *[True] * len(bad), False]
    said = capsys.readouterr().err
    for index in range(1, len(bad) + 1):
        assert f"row {index} (line {index + 1}): {out[index]['error']}" in said
    assert f"{len(bad) + 2} rows: 2 rows done now, {len(bad)} failed" in said
    assert "hit rate" in said
    assert "B a token" in said


def test_an_interrupted_batch_goes_on_without_repeating_a_row(
    batch: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = batch(ROWS).read_bytes()
    (tmp_path / "out.jsonl").unlink()
    asked: list[str] = []

    def interrupted(*arguments: Any) -> Any:
        for number, result in enumerate(original(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield result

    original = feed.run
    monkeypatch.setattr(feed, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch(ROWS)
    assert not (tmp_path / "out.jsonl").exists()
    partial = tmp_path / "out.jsonl.partial"
    done = {line["index"] for line in read(partial)[1:]}
    assert len(done) == 2
    with partial.open("ab") as file:
        file.write(b'{"index": 3, "te')  # the kill cut a line off

    def watched(loop: Any, requests: Any, lookahead: int) -> Any:
        kept = [*requests]
        asked.extend(request.id for request in kept)
        return original(loop, kept, lookahead)

    monkeypatch.setattr(feed, "run", watched)
    assert batch(ROWS).read_bytes() == whole
    assert sorted(asked) == sorted(f"{index}/0" for index in set(range(4)) - done)
    assert not partial.exists()


def test_a_partial_file_of_another_batch_is_refused_and_kept(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {"rows": "a"}) as journal:
        journal.add(0, {"text": "x"})
    before = (tmp_path / "out.partial").read_bytes()
    with pytest.raises(ValueError, match="of another batch"):
        Journal(tmp_path / "out", {"rows": "b"})
    assert (tmp_path / "out.partial").read_bytes() == before


def test_a_start_that_came_to_nothing_binds_nobody(tmp_path: Path) -> None:
    Journal(tmp_path / "out", {"rows": "a"}).__exit__(None, None, None)
    with Journal(tmp_path / "out", {"rows": "b"}) as journal:
        journal.add(0, {"text": "x"})
        journal.finish()
    assert read(tmp_path / "out") == [{"text": "x"}]


def test_a_batch_can_be_recorded(batch: Callable[..., Path], tmp_path: Path) -> None:
    batch(ROWS, record=tmp_path / "routes")
    documents = TraceReader(tmp_path / "routes", verify=True).documents()
    prompts = {tuple(d.token_ids_T[d.phase_T == PROMPT].tolist()) for d in documents}
    assert prompts == {tuple(tiny_tokenizer()(row["prompt"]).input_ids) for row in ROWS}
    with pytest.raises(ValueError, match="several workers cannot write one recording"):
        batch(ROWS, record=tmp_path / "routes", workers=2)


def test_an_output_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        Journal(tmp_path / "out", {})
    assert (tmp_path / "out").read_text() == "precious"


def test_the_command_fails_with_one_line(
    tiny_directory: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, missing = tiny_directory("olmoe"), tmp_path / "no.jsonl"
    words = [f"--model={model}", f"--dataset={missing}", f"--out={tmp_path / 'o'}"]
    with pytest.raises(SystemExit) as stopped:
        run(main, BatchSettings, words, prog=PROG)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{PROG}: error: there is no file {missing}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_text_file_is_a_prompt_a_line_and_a_parquet_file_a_table(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "a.txt").write_text("one\ntwo\n")
    Dataset.from_list([{"prompt": "one"}, {"prompt": "two"}]).to_parquet(tmp_path / "a.parquet")
    for name in ("a.txt", "a.parquet"):
        assert [row.data for row in rows_of(str(tmp_path / name), "train")] == [
            {"prompt": "one"}, {"prompt": "two"},
        ]  # fmt: skip


# ---------------------------------------------------------------------- going on, and failures


def test_rows_keep_their_ids(batch: Callable[..., Path]) -> None:
    rows = [{"prompt": "a", "id": 7}, {"prompt": "b", "custom_id": "x"}, {"prompt": "c"}]
    out = read(batch(rows))
    assert [(line.get("id"), line.get("custom_id")) for line in out] == [
        (7, None), (None, "x"), (None, None),
    ]  # fmt: skip


def test_half_a_surrogate_pair_in_an_id_loses_nothing(batch: Callable[..., Path]) -> None:
    assert read(batch([{"prompt": "a", "id": "\ud800"}]))[0]["id"] == "\ud800"


def test_messages_take_the_chat_template_that_is_given(
    batch: Callable[..., Path], tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = {"messages": [{"role": "user", "content": "alpha"}]}
    line, plain = read(batch([chat, {"prompt": "alpha"}], chat_template=str(template)))
    assert line["text"] == plain["text"]


def test_failed_rows_are_served_again_when_asked_for_and_the_others_are_not(
    batch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out.jsonl"
    whole = batch(ROWS).read_bytes()
    out.unlink()
    out.touch()
    with pytest.raises(ValueError, match="has no failed rows"):
        batch(ROWS, retry_failed=True)
    out.unlink()
    original = feed.run

    def failing(loop: Any, requests: Any, lookahead: int) -> Any:
        for result in original(loop, requests, lookahead):
            is_second = result.id == "1/0"
            yield replace(result, finish="error", error="no memory") if is_second else result

    monkeypatch.setattr(feed, "run", failing)
    with pytest.raises(SystemExit):
        batch(ROWS)
    assert read(out)[1] == {"index": 1, "error": "no memory"}
    with pytest.raises(ValueError, match="serve its failed rows again with --retry-failed"):
        batch(ROWS)
    asked: list[str] = []

    def watched(loop: Any, requests: Any, lookahead: int) -> Any:
        kept = [*requests]
        asked.extend(request.id for request in kept)
        return original(loop, kept, lookahead)

    monkeypatch.setattr(feed, "run", watched)
    capsys.readouterr()
    assert batch(ROWS, retry_failed=True).read_bytes() == whole
    assert asked == ["1/0"]
    said = capsys.readouterr().err
    assert "3 of 4 rows are done; 1 that failed are served again" in said
    assert "4 rows: 3 before, 1 rows done now, 0 failed" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_two_processes_cannot_write_one_output(batch: Callable[..., Path], tmp_path: Path) -> None:
    with Journal(tmp_path / "out.jsonl", {"rows": "a"}) as journal:
        journal.add(0, {"text": "x"})
        before = journal.path.read_bytes()
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on "):
            batch(ROWS)
        assert journal.path.read_bytes() == before
        with pytest.raises(ValueError, match="is being written by"):
            Journal(tmp_path / "out.jsonl", {"rows": "a"})


def test_a_terminated_batch_goes_on(tiny_directory: Callable[[str], Path], tmp_path: Path) -> None:
    dataset, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    dataset.write_text('{"prompt": "alpha", "max_tokens": 20}\n' * 400)
    words = ["--model", tiny_directory("olmoe"), "--dataset", dataset, "--out", out]
    words += ["--batch=2", "--rows=2", "--context=64", "--memory=0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.batch", *map(str, words)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    partial = tmp_path / "out.jsonl.partial"
    while process.poll() is None and not (
        partial.exists() and partial.read_bytes().count(b"\n") > 3
    ):
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert "Traceback" not in said and "not yet served; the same command goes on" in said
    num_done = partial.read_bytes().count(b"\n") - 1
    assert f"{num_done} rows done now, 0 failed, {400 - num_done} not yet served" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [partial.name, "rows.jsonl"]


def test_a_full_disk_is_one_message_and_loses_no_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = Journal(out, {"rows": "a"})
    journal.add(0, {"text": "x"})
    full: Any = open("/dev/full", "ab")  # noqa: SIM115
    kept, journal._file = journal._file, full
    with pytest.raises(ValueError, match=r"No space left on device.*the 1 results in it are kept"):
        journal.add(1, {"text": "y"})
    with suppress(OSError):
        full.close()
    journal._file = kept
    journal.close()
    with Journal(out, {"rows": "a"}) as journal:
        assert journal.done == {0}


def test_a_damaged_line_of_the_partial_file_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {"rows": "a"}) as journal:
        journal.add(0, {"text": "x"})
        journal.add(1, {"text": "y"})
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + b"\0\0\n" + lines[2])
    with pytest.raises(ValueError, match=r"line 2 of .*out.partial is damaged"):
        Journal(tmp_path / "out", {"rows": "a"})
    journal.path.write_bytes(lines[0] + lines[2])
    with Journal(tmp_path / "out", {"rows": "a"}) as journal:
        assert journal.done == {1}


def test_an_error_gives_way_to_a_result_that_comes_later(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {"rows": "a"}) as journal:
        journal.add(1, {"error": "x"}, failed=True)
        journal.add(0, {"text": "a"})
        journal.finish()
    assert journal.path.exists()
    with Journal(tmp_path / "out", {"rows": "a"}, retry_failed=True) as journal:
        assert (journal.done, journal.failed) == ({0}, {1})
        journal.add(1, {"text": "b"})
        journal.finish()
    assert read(tmp_path / "out") == [{"text": "a"}, {"text": "b"}]
    assert not journal.path.exists()


def test_the_course_of_a_run_is_drawn(batch: Callable[..., Path], tmp_path: Path) -> None:
    batch(ROWS, plot=tmp_path / "course.png")
    assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")


def test_a_course_is_thinned_to_parts_of_even_length() -> None:
    moments = [Moment(second / 10, 5 * second, 0.5, 1000 * second) for second in range(1, 5001)]
    parts = thinned(moments)
    assert 50 <= len(parts) <= PARTS + 1 and parts[-1] == moments[-1]
    assert tokens_per_s(parts[3], parts[4]) == pytest.approx(50)
    assert mb_per_token(parts[3], parts[4]) == pytest.approx(0.0002)
    assert thinned([]) == []
