"""benchmarks.cache.knowledge, .policy_cost and .kinds: their output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cache.kinds import KindsSettings, agreement
from benchmarks.cache.kinds import main as compare_kinds
from benchmarks.cache.knowledge import KnowledgeSettings
from benchmarks.cache.knowledge import main as know
from benchmarks.cache.live_kinds import documents
from benchmarks.cache.page import agreeing
from benchmarks.cache.policy_cost import CostSettings
from benchmarks.cache.policy_cost import main as time_policy
from routing.inspect_model import topology_of
from routing.pretrained import read_tokenizer
from runtime.cache.policies import FREE_RULES, LIVE_FREE_RULES, QUEUE_CACHES
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import TOPOLOGY, write_trace
from tests.helpers.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The share of the gap closed at both cache sizes, by the line's name."""
    folder = tmp_path_factory.mktemp("knowledge")
    trace = write_trace(folder / "trace", num_documents=10, seed=5)
    predictor = write_predictor(folder / "predictor.onnx", TOPOLOGY)
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: said.append(text))
        know(KnowledgeSettings(trace=trace, predictor=predictor, residency=[0.25, 0.5]))
    found = {line[:40].strip(): re.findall(r": (-?\d+\.\d+)", line[40:]) for line in said[1:]}
    return {name: [float(share) for share in shares] for name, shares in found.items()}


def test_knowing_the_next_steps_closes_more_of_the_gap_than_a_poor_prediction(lines) -> None:
    predicted, informed = lines["as predicted"], lines["known: next, horizon, far"]
    assert all(known > said for said, known in zip(predicted, informed, strict=True))


def test_every_change_of_the_formula_is_one_line(lines) -> None:
    assert len(lines) == 13 and all(len(shares) == 2 for shares in lines.values())
    assert max(share for name, s in lines.items() if "bypass" not in name for share in s) <= 1.0


def test_the_cost_of_every_policy_that_needs_no_future_is_timed(capsys) -> None:
    time_policy(CostSettings(layers=3, experts=8, top_k=2, steps=20))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "3 x 8, 2 experts a token" and all("median" in line for line in lines)
    timed = {line.partition(":")[0] for line in lines}
    assert {"predicted, values alone", "predicted", "class-lru, table", *LIVE_FREE_RULES} <= timed
    assert {f"{name}, with its search" for name in QUEUE_CACHES} <= timed


def test_the_rules_on_every_kind_are_tables_that_their_file_gives_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace", num_documents=6, seed=5)
    predictor = write_predictor(tmp_path / "predictor.onnx", TOPOLOGY)
    out, sizes = tmp_path / "kinds.json", [0.25, 0.5]
    compare_kinds(
        KindsSettings(json=out, trace=trace, predictor=predictor, fit_trace=trace, residency=sizes)
    )
    printed = capsys.readouterr().out
    compare_kinds(KindsSettings(json=out))
    assert capsys.readouterr().out == printed
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if "|" in line]
    heads = [row for row in rows if row[0] == "kind"]
    assert len(heads) == 2 and {*FREE_RULES, "hot-set", "predicted", "belady"} <= set(heads[0])
    assert heads[0][-3:] == ["best free", "gap of LRU", "gap of best free"]
    means = [dict(zip(heads[0], row, strict=True)) for row in rows if row[0] == "mean"]
    for mean in means:
        assert float(mean["belady"]) >= max(float(mean[name]) for name in FREE_RULES)
        assert mean["best free"] in FREE_RULES


def test_runs_over_other_kinds_or_sizes_are_joined_in_one_file(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace", num_documents=4, seed=5)
    parts = [tmp_path / "quarter.json", tmp_path / "half.json"]
    for part, size in zip(parts, (0.25, 0.5), strict=True):
        compare_kinds(KindsSettings(json=part, trace=trace, residency=[size]))
    compare_kinds(KindsSettings(json=tmp_path / "all.json", parts=parts))
    joined, *read = (json.loads(f.read_text()) for f in (tmp_path / "all.json", *parts))
    assert joined == {key: [*read[0][key], *read[1][key]] for key in ("commands", "rows")}


# ---------------------------------------------------------------------- live, by kind


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a live run of a tiny model on two kinds of text."""
    folder = tmp_path_factory.mktemp("live")
    model = save_tiny(folder / "model", "olmoe")
    topology = topology_of(tiny_model("olmoe"), read_tokenizer(model))
    text = folder / "text"
    text.mkdir()
    (text / "prose.txt").write_text("It was a dark night.\n<|endoftext|>\nThe rain fell.\n")
    (text / "digits.txt").write_text("1 2 3 1 2 3 1 2 3 1 2 3\n")
    predictor = write_predictor(folder / "predictor.onnx", topology, window=6)
    return {"model": model, "text": text, "predictor": predictor, "kind_tokens": 24}


def test_live_runs_by_kind_give_the_rows_and_the_tables_of_simulated_ones(
    live: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, policies = tmp_path / "live.json", ["lru", "lfu", "predicted"]
    compare_kinds(KindsSettings(json=out, residency=[0.25, 0.5], policies=policies, **live))
    printed = capsys.readouterr().out
    compare_kinds(KindsSettings(json=out))
    assert capsys.readouterr().out == printed
    assert "12 of 12 live runs load exactly what their simulation loads" in printed
    rows = json.loads(out.read_text())["rows"]
    ran = [row for row in rows if row["live"]]
    assert {row["policy"] for row in ran} == set(policies)
    assert {row["kind"] for row in ran} == {"prose", "digits"}
    assert {*FREE_RULES, "belady"} - set(policies) <= {r["policy"] for r in rows if not r["live"]}
    for row in ran:
        assert row["identical"] and row["loads"] == row["simulated_loads"] > 0
        assert row["slots"] == row["residency"] * 32 and row["requests"] == 24 * 4 * 2


def test_live_runs_take_the_first_tokens_of_a_kinds_documents(live: dict[str, Any]) -> None:
    tokenizer = read_tokenizer(live["model"])
    texts = list(documents(live["text"] / "prose.txt", tokenizer, 8, 12))
    assert [tokenizer.decode(ids[0]) for ids in texts] == ["It was a", "The "]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": None}, "give --text"),
        ({"kinds": ["greek", "prose"]}, "no text of the kind greek"),
        ({"predictor": None}, "predicted needs --predictor"),
        ({"policies": ["hot-set"]}, "hot-set needs --fit_trace"),
        ({"policies": ["arc"]}, "arc does not run live: take lru"),
    ],
)
def test_live_runs_without_what_they_need_are_refused_before_anything_runs(
    live: dict[str, Any], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    out = tmp_path / "live.json"
    with pytest.raises(ValueError, match=message):
        compare_kinds(KindsSettings(json=out, **(live | options)))
    assert not out.exists()


def test_live_runs_with_a_predictor_of_another_model_are_refused(
    live: dict[str, Any], tmp_path: Path
) -> None:
    options = live | {"predictor": write_predictor(tmp_path / "other.onnx", TOPOLOGY)}
    with pytest.raises(ValueError, match=r"the predictor .*other\.onnx is for rules"):
        compare_kinds(KindsSettings(json=tmp_path / "live.json", **options))


def test_a_trace_and_a_model_are_not_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--trace to simulate or --model to run live"):
        KindsSettings(json=tmp_path / "kinds.json", trace=tmp_path, model=tmp_path)


def test_a_live_run_that_loads_one_more_than_its_simulation_does_not_agree() -> None:
    row = {"loads": 4, "simulated_loads": 4, "requests": 100, "identical": True}
    live = [row, row | {"loads": 5}, row | {"loads": 3, "identical": False}]
    assert agreeing(live) == (1, 2)
    assert agreement(live).startswith("1 of 3 live runs load exactly")
    assert "at most 0.0100 of hit rate; the tokens of 2 are" in agreement(live)
