"""benchmarks.cache.knowledge and .policy_cost: their output."""

from __future__ import annotations

import re

import pytest

from benchmarks.cache.knowledge import KnowledgeSettings
from benchmarks.cache.knowledge import main as know
from benchmarks.cache.policy_cost import CostSettings
from benchmarks.cache.policy_cost import main as time_policy
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import TOPOLOGY, write_trace


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


def test_the_cost_of_the_policy_is_timed_with_and_without_touches(capsys) -> None:
    time_policy(CostSettings(layers=3, experts=8, top_k=2, steps=20))
    values, whole = capsys.readouterr().out.splitlines()
    assert values.startswith("values, 3 x 8: median") and whole.startswith("values and touches")
