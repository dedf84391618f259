"""Pages of results: their tables are those that the JSON files beside them give."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cache import page as kinds_page
from benchmarks.pages import others, picture, upcycled
from benchmarks.pages.__main__ import RESULTS, ROOT, PagesSettings, documents, main, outdated
from benchmarks.pages.blocks import filled

GROUPS = {"scripts": {"a": "Latin", "b": "Thai"}, "groups": {"two": {"old": ["a"], "new": ["b"]}}}
TABLES = {"names": lambda *found, mark="": [f"{mark}{one['file']}: {one['x']}" for one in found]}


def kinds_file(**predicted: float) -> dict[str, Any]:
    """Results of a quarter resident: LRU 0.4, LFU 0.5, Belady 0.9, predicted as given by kind."""
    rates = {
        kind: {"lru": 0.4, "lfu": 0.5, "predicted": rate, "belady": 0.9}
        for kind, rate in predicted.items()
    }
    rows = [
        {"kind": kind, "policy": policy, "residency": 0.25, "requests": 1000,
         "loads": 1000 - 1000 * rate}
        for kind, policies in rates.items() for policy, rate in policies.items()
    ]  # fmt: skip
    return {"file": "value-moe", "rows": rows}


def cells(lines: Iterator[str]) -> list[list[str]]:
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [head, *rows]


@pytest.mark.parametrize("page", documents(), ids=lambda path: path.stem)
def test_the_tables_of_a_page_are_those_that_its_files_give(page: Path) -> None:
    assert outdated([page]) == {}, "python -m benchmarks.pages"


def test_a_block_is_replaced_and_the_prose_around_it_stays(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"x": len(name)}))
    text = "Before.\n<!-- table: names *.json mark=- -->\nold\n\n<!-- end -->\nAfter.\n"
    new = filled(text, TABLES, tmp_path)
    assert new == text.replace("old\n\n", "-one: 3\n-two: 3\n")
    assert filled(new, TABLES, tmp_path) == new


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("<!-- table: names none.json -->\n<!-- end -->", "none.json is not there"),
        ("<!-- table: other -->\n<!-- end -->", "no table 'other'; there are names"),
        ("<!-- table: names size=1 -->\n<!-- end -->", "unexpected keyword argument 'size'"),
        ("<!-- table: names one.json -->\n<!-- end -->", "the files have no 'x'"),
        ("<!-- table: names -->\n", "no line '<!-- end -->'"),
        ("<!-- table: names -->\n<!-- table: names -->\n<!-- end -->", "no line '<!-- end -->'"),
    ],
)
def test_a_block_that_cannot_be_made_is_refused(block: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(message)):
        filled(block, TABLES, tmp_path)


def test_a_check_names_the_page_that_is_out_of_date_and_leaves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    file = min(RESULTS.glob("*-online-value-*.json")).name
    page.write_text(before := f"<!-- table: kinds-winners {file} -->\n<!-- end -->\n")
    with pytest.raises(SystemExit) as stopped:
        main(PagesSettings(pages=[page], check=True))
    assert stopped.value.code == 1 and f"{page} is out of date" in capsys.readouterr().out
    assert page.read_text() == before
    main(PagesSettings(pages=[page]))
    assert "| lfu |" in page.read_text()
    main(PagesSettings(pages=[page], check=True))


def test_the_overview_counts_what_lies_below_the_best_free_rule() -> None:
    documents = kinds_file(a=0.7, b=0.496), GROUPS
    _, old, new = cells(kinds_page.overview(*documents, groups="two", after="value-"))
    assert old == ["moe", "old", "50%", "50%", "0 of 1", "+0.200, a at 25 %"]
    assert new == ["moe", "new", "-1%", "-1%", "1 of 1", "-0.004, b at 25 %"]


def test_means_of_groups_are_against_the_best_free_rule_of_each_kind() -> None:
    head, old, _ = cells(kinds_page.by_group(kinds_file(a=0.7, b=0.5), GROUPS, groups="two"))
    assert head[-3:] == ["best free", "gap of LRU", "gap of best free"]
    assert old == ["old (1)", "25 %", "0.400", "0.500", "0.700", "0.900", "0.500", "60%", "50%"]


def test_one_run_is_a_row_for_each_cache_size() -> None:
    rates = {"lru": 0.4, "lfu": 0.5, "predicted": 0.7, "belady": 0.9}
    runs = [{"policy": p, "residency": 0.5, "hit_rate": rate} for p, rate in rates.items()]
    head, row = cells(kinds_page.hit_rates({"runs": runs}, policies="lru,predicted"))
    assert head == ["resident", "lru", "predicted", "best free", "gap of LRU", "gap of best free"]
    assert row == ["50 %", "0.400", "0.700", "0.500", "60%", "50%"]


def test_live_runs_are_counted_that_agree_with_their_simulation() -> None:
    document = kinds_file(a=0.7, b=0.6)
    predicted = [row for row in document["rows"] if row["policy"] == "predicted"]
    for row, extra in zip(predicted, (0, 1), strict=True):
        row |= {"live": True, "identical": True, "simulated_loads": row["loads"] + extra}
    _, row = cells(kinds_page.live_counts(document, after="value-"))
    assert row == ["moe", "2", "2", "1", "2"]


def test_the_kinds_of_one_group_stand_apart() -> None:
    document = kinds_file(a=0.7, b=0.5)
    leads = cells(kinds_page.leads(document, GROUPS, groups="two", only="new"))
    assert leads == [["kind", "script", "25 %"], ["b", "Thai", "0.500 (lfu), 0.500, 0.900"]]
    head, *rows = cells(kinds_page.leads(document, GROUPS, groups="two"))
    assert head == ["kind", "text", "script", "25 %"]
    assert [row[:3] for row in rows] == [["a", "old", "Latin"], ["b", "new", "Thai"]]


def test_predictors_are_listed_with_and_without_history_for_each_text() -> None:
    figures = {"recall": 0.9, "recall_1_5k": 0.95, "calibration_error": 0.01}
    heads = {"this": {name: {"mean": value} for name, value in figures.items()}}
    histories = {"token-id table": "unused", "p.onnx": "known"}
    found = [{"name": name, "history": how, "heads": heads} for name, how in histories.items()]
    document = {"file": "recall-held-out", "predictors": found}
    _, table, ours = cells(others.recall(document, head="this", after="recall-"))
    assert table == ["held out", "token-id table", "0.900", "0.950", "0.010"]
    assert ours[1] == "p.onnx, history known"


def test_perplexities_stand_beside_the_dense_models_and_say_what_was_trained_on() -> None:
    rows = {"de": {"dense": 20.0, "mixture": 10.0}, "el": {"dense": 4.0, "mixture": 5.0}}
    document = {"tokens": {"de": 12345}, "held_out": {"perplexity": rows}}
    *_, first, second = upcycled.perplexity(document)
    assert first == "| de | 12,345 | 20.00 | 10.00 | -50.0% |"
    assert second == "| el | none | 4.00 | 5.00 | +25.0% |"


def test_the_two_most_used_experts_are_those_of_each_layer() -> None:
    shares = {"de": [[0.5, 0.1, 0.4], [0.2, 0.2, 0.6]]}
    document = {"routing": {"entropy_by_domain": {"de": 0.75}, "shares": shares}}
    assert list(upcycled.routing(document))[-1] == "| de | 0.750 | 85.0% |"


def test_equal_answers_are_said_to_be_the_same() -> None:
    rows = [
        {"question": "a|b", "dense": "yes\nno", "mixture": "yes\nno"},
        {"question": "c", "dense": "1", "mixture": "2"},
    ]
    *_, first, second = upcycled.answers({"answers": rows})
    assert first == "| a\\|b | yes ⏎ no | *the same* |" and second == "| c | 1 | 2 |"


def test_groups_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"no groups 'three' of kinds; there are two"):
        kinds_page.by_group(kinds_file(a=0.7), GROUPS, groups="three")


@pytest.mark.parametrize(
    "page", [p for p in documents() if p.name[:10] >= "2026-11-29" and p.name[:1] == "2"],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_a_table_is_made_of_a_file_or_says_why_it_is_written_by_hand(page: Path) -> None:
    blocks = re.compile(r"^<!-- table: .*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
    lines = ["", *blocks.sub("", page.read_text()).splitlines()]
    heads = [i for i, line in enumerate(lines) if line.startswith("|") and lines[i - 1][:1] != "|"]
    assert [lines[i] for i in heads if not re.match(r"<!-- by hand: .+ -->", lines[i - 1])] == []


def test_the_figures_of_the_readme_are_those_of_their_files() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    runs = json.loads((RESULTS / "2026-11-29-demo.json").read_text())["runs"]
    rates = {run["policy"]: f"{run['hit_rate']:.3f}" for run in runs}
    assert f"(`make demo`) {rates['lru']}, {rates['predicted']}, {rates['belady']}" in readme
    plain = coded_arm("olmoe-attention", "olmoe-7b mxfp4 lru 1.0 trace")
    compiled = coded_arm("olmoe-attention", "olmoe-7b mxfp4 lru compile 1.0 trace")
    speeds, memory = (
        " / ".join(f"{row[key] / unit:{spec}}" for row in (plain, compiled))
        for key, unit, spec in (("tokens_per_s", 1, ".0f"), ("peak_bytes", 2**30, ".1f"))
    )
    assert f"{memory} GiB | **{speeds}**" in readme


def coded_arm(file: str, name: str) -> dict[str, Any]:
    """The row of an arm of `benchmarks.encodings`."""
    rows = json.loads((RESULTS / f"2026-11-29-encodings-{file}-h200.json").read_text())["rows"]
    return next(row for row in rows if row["name"] == name)


def test_the_readmes_picture_shows_what_the_files_say(tmp_path: Path) -> None:
    document = kinds_file(a=0.6, b=0.7)
    rates = picture.hit_rates(document)
    assert rates["predicted"] == {0.25: pytest.approx(0.65)}
    assert rates["best rule without a predictor"] == {0.25: pytest.approx(0.5)}
    speed = {"residency": "0.25", "peak_bytes": 2**31, "tokens_per_s": 100.0, "error": None,
             "compile": True, "batch": 1, "encoding": "mxfp4"}  # fmt: skip
    rows = [
        speed | {"name": "olmoe mxfp4 reuse compile cpu 0.25"},
        speed | {"name": "x", "compile": False},
        speed | {"name": "y", "error": "skipped"},
    ]
    (point,) = picture.speeds([{"rows": rows}])
    assert (point.label, point.gib, point.shares_work) == ("mxfp4, a quarter", 2.0, True)


def test_the_readmes_picture_is_drawn_from_the_files_that_are_there(tmp_path: Path) -> None:
    picture.main(picture.PictureSettings(out=tmp_path / "new" / "results.png"))
    assert (tmp_path / "new" / "results.png").read_bytes().startswith(b"\x89PNG")
