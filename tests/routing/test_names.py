"""routing.names: rows of tables can be told apart, however narrow the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.table import Table

from routing.names import print_whole, told_apart, without_common_folder

LAYERS = [f"model.language_model.layers.{n}.feed_forward.block_sparse.experts" for n in range(12)]


def test_no_name_and_no_figure_of_a_printed_table_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = Table("layer", *(f"/runs/some/where/predictor-{n}.onnx" for n in range(6)))
    for layer in LAYERS:
        table.add_row(layer, *(f"{n}.12345" for n in range(6)))
    print_whole(table)
    printed = capsys.readouterr().out
    assert "…" not in printed
    for name in (*LAYERS, *(f"/predictor-{n}.onnx" for n in range(6)), "5.12345"):
        assert name in printed


def test_a_table_that_fits_is_as_wide_as_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("name … with an ellipsis", "words that wrap over several lines, as they did")
    table.add_row("a…", "some words and some more words and more")
    print_whole(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


def test_names_of_files_are_short_where_that_tells_them_apart() -> None:
    same, other = [Path("a/x.onnx"), Path("b/x.onnx")], [Path("a/x.onnx"), Path("b/y.onnx")]
    assert told_apart(same, lambda path: path.stem) == ["a/x.onnx", "b/x.onnx"]
    assert told_apart(other, lambda path: path.stem) == ["x", "y"]


def test_absolute_paths_lose_the_folders_that_they_share() -> None:
    names = ["frequency", "/long/way/run-1/p.onnx", "/long/way/run-2/p.onnx"]
    assert without_common_folder(names) == ["frequency", "run-1/p.onnx", "run-2/p.onnx"]
    assert without_common_folder(["/a/p.onnx", "b"]) == ["/a/p.onnx", "b"]
    assert without_common_folder(["/a/p.onnx"] * 2) == ["/a/p.onnx"] * 2
