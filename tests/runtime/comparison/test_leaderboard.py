"""The leaderboard: written, merged, and refused where it cannot be right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from routing.cli import run
from routing.shards import TraceReader
from runtime.comparison.leaderboard import FIELDS, KIND, read_board, with_entries, write_board
from runtime.comparison.leaderboard_command import leaderboard
from runtime.comparison.settings import CompareSettings, LeaderboardSettings
from runtime.comparison.split import digest, split_trace

Entry = dict[str, Any]


def entry(**fields: Any) -> Entry:
    """An entry with every required field, and some of the others."""
    return dict.fromkeys(FIELDS) | {
        "contender": "lru", "by": "me", "model": "rules 0123", "routes": "ab" * 32,
        "label": "all", "cache": "carried", "tokens": 100, "warm_up": 0, "expert_mb": 12.6,
        "link_gb_s": 55.0, "layer_ms": 0.2, "mb_per_token": 3.5, "residency": 0.25,
        "hit_rate": 0.5, "gap_lru": -0.25,
    } | fields  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_a_board_is_read_as_it_was_written(suffix: str, tmp_path: Path) -> None:
    board = [entry(), entry(contender="belady, with a comma", hit_rate=1 / 3, recall_at_k=0.1)]
    write_board(tmp_path / f"board{suffix}", board)
    assert read_board(tmp_path / f"board{suffix}") == board


def test_entries_of_others_are_added_and_ones_own_are_replaced() -> None:
    board = with_entries([], [entry(), entry(contender="mine", hit_rate=0.6)], "a")
    board = with_entries(board, [entry(contender="theirs", by="them", hit_rate=0.7)], "b")
    assert [one["contender"] for one in board] == ["lru", "mine", "theirs"]
    board = with_entries(board, [entry(contender="mine", hit_rate=0.65)], "c")
    assert [one["hit_rate"] for one in board] == [0.5, 0.65, 0.7]
    board = with_entries(board, [entry(by="them")], "d")  # the same figure, found again
    assert [one["by"] for one in board if one["contender"] == "lru"] == ["me", "them"]


def test_entries_that_contradict_each_other_are_refused_and_the_board_is_left(
    tmp_path: Path,
) -> None:
    write_board(tmp_path / "board.json", [entry()])
    before = (tmp_path / "board.json").read_bytes()
    write_board(tmp_path / "theirs.csv", [entry(by="them", hit_rate=0.6)])
    with pytest.raises(ValueError, match=r"theirs\.csv: lru at 0\.25 on all hits 0\.6.* by them"):
        leaderboard(
            LeaderboardSettings(board=tmp_path / "board.json", add=[tmp_path / "theirs.csv"])
        )
    assert (tmp_path / "board.json").read_bytes() == before


def test_other_protocols_and_labels_do_not_contradict() -> None:
    for other in ({"warm_up": 5}, {"cache": "emptied"}, {"label": "even"}, {"residency": 0.5}):
        assert len(with_entries([entry()], [entry(by="them", hit_rate=0.6, **other)], "b")) == 2


def test_nothing_hits_more_often_than_the_optimum() -> None:
    optimum = entry(contender="belady+bypass", hit_rate=0.8)
    with_entries([optimum], [entry(contender="good", hit_rate=0.8)], "b")
    with_entries([optimum], [entry(contender="of other routes", routes="c", hit_rate=0.9)], "b")
    with pytest.raises(ValueError, match=r"magic at 0\.25 on all hits 0\.81.*above the optimum"):
        with_entries([optimum], [entry(contender="magic", hit_rate=0.81)], "b")


DAMAGE: dict[str, tuple[Callable[[Entry], object], str]] = {
    "a field too few": (lambda e: e.pop("hit_rate"), "lacks hit_rate"),
    "a field too many": (lambda e: e.update(speed=3), "unknown fields speed"),
    "text for a number": (lambda e: e.update(hit_rate="high"), "hit_rate is 'high', not a number"),
    "a number for text": (lambda e: e.update(by=3), "by is 3, not text"),
    "percent": (lambda e: e.update(hit_rate=50.0), "hit_rate is 50.0, not between 0 and 1"),
    "half a token": (lambda e: e.update(tokens=0.5), "tokens is 0.5, not a count"),
    "not a number": (lambda e: e.update(gap_lru=float("nan")), "gap_lru is nan, not a number"),
    "negative bytes": (lambda e: e.update(mb_per_token=-1.0), "mb_per_token is -1.0, below 0"),
    "true": (lambda e: e.update(tokens=True), "tokens is True, not a number"),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_an_entry_that_is_none_is_refused_by_its_field(case: str, tmp_path: Path) -> None:
    change, message = DAMAGE[case]
    wrong = entry()
    change(wrong)
    data = {"kind": KIND, "schema": 1, "entries": [entry(contender="fine"), wrong]}
    (tmp_path / "board.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as refused:
        read_board(tmp_path / "board.json")
    assert "board.json, entry 2" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("board.json", "[", "is no JSON"),
        ("board.json", "[]", "is no leaderboard"),
        ("board.json", json.dumps({"kind": KIND, "schema": 9}), "has schema 9"),
        ("board.json", json.dumps({"kind": KIND, "schema": 1, "entries": [3]}), "no list of"),
        ("board.csv", "contender,hit_rate\nlru,much\n", "line 2: hit_rate is 'much'"),
        ("board.csv", "contender,hit_rate\nlru\n", "line 2: it has not as many cells"),
        ("board.txt", "", r"is a \.json or a \.csv file"),
    ],
)
def test_a_file_that_is_no_board_is_refused(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_board(tmp_path / name)


def test_the_command_merges_and_prints_the_best_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_board(tmp_path / "one.csv", [entry(), entry(label="even")])
    write_board(tmp_path / "two.json", [entry(contender="better", by="them", hit_rate=0.7)])
    words = [
        str(tmp_path / "board.json"),
        "--add",
        *(str(tmp_path / n) for n in ("one.csv", "two.json")),
    ]
    run(leaderboard, LeaderboardSettings, words, prog="p", positional=["board"])
    shown = capsys.readouterr().out
    assert "3 entries" in shown and shown.index("better") < shown.index("lru ")
    assert len(read_board(tmp_path / "board.json")) == 3
    with pytest.raises(ValueError, match="no entries of the label 'odd', but of: all, even"):
        leaderboard(LeaderboardSettings(board=tmp_path / "board.json", label="odd"))
    with pytest.raises(ValueError, match="there is no such leaderboard"):
        leaderboard(LeaderboardSettings(board=tmp_path / "none.json"))


def test_the_published_board_is_of_the_trace_beside_it() -> None:
    folder = Path(__file__).parents[3] / "docs" / "results" / "leaderboard"
    reader = TraceReader(folder / "trace", verify=True)
    with split_trace(reader, CompareSettings(trace=folder / "trace")) as split:
        routes = digest(split.compared.documents(), reader)
    board = read_board(folder / "board.csv")
    assert {one["routes"] for one in board} == {routes}
    assert {one["label"] for one in board} == {"all", *reader.labels}
    assert {"lru", "belady", "moe-8x32"} <= {one["contender"] for one in board}
