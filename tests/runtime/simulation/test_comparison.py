"""Baselines, the timeline of the link model, and the table of all contenders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.cli import run
from routing.shards import TraceReader
from runtime.cache.belady import Calls
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LRU
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.simulate import main
from runtime.simulation.baselines import Baseline, answers, fit_baselines, used_by
from runtime.simulation.comparison import baseline_forecasts, predicting, recall
from runtime.simulation.link_model import Machine, Timeline
from runtime.simulation.replay import Simulation
from runtime.simulation.settings import SimulateSettings
from runtime.simulation.trace_steps import TraceStep, document_steps
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import NUM_EXPERTS, NUM_LAYERS, TOPOLOGY, write_trace

SHAPE = NUM_LAYERS, NUM_EXPERTS
MACHINE = Machine(expert_ms=2.0, layer_ms=3.0)
BY_TOKEN, BY_SECRET = 0, 2
"""Layers of the traces of tests.helpers.predicting, by what decides their routes."""


def documents_of(directory: Path) -> list[list[TraceStep]]:
    return [
        list(document_steps(document, NUM_EXPERTS, decode_all=True))
        for document in TraceReader(directory).documents()
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Baseline]:
    directory = write_trace(tmp_path_factory.mktemp("fit") / "rules", num_documents=60)
    return {r.name: r for r in fit_baselines(documents_of(directory), NUM_EXPERTS, 3)}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> list[list[TraceStep]]:
    return documents_of(write_trace(tmp_path_factory.mktemp("t") / "rules", seed=9))[:12]


def recall_of_layer(baseline: Baseline, documents: list[list[TraceStep]], layer: int) -> float:
    forecast = np.stack([f.this_LE for f in baseline_forecasts(baseline, documents, NUM_EXPERTS)])
    used = np.concatenate([used_by(steps, NUM_EXPERTS) for steps in documents])
    return recall(forecast[:, layer : layer + 1], used[:, layer : layer + 1])


def test_each_baseline_predicts_the_layer_that_follows_its_rule_and_no_other(
    fitted, held_out
) -> None:
    by_token = {n: recall_of_layer(r, held_out, BY_TOKEN) for n, r in fitted.items()}
    by_secret = {n: recall_of_layer(r, held_out, BY_SECRET) for n, r in fitted.items()}
    assert by_token["token table"] > 0.99 > 0.6 > by_token["previous token"]
    assert by_secret["previous token"] > 0.9 > 0.6 > by_secret["token table"]
    assert by_secret["nearest maps"] > 0.8
    assert max(by_token["static hot set"], by_secret["static hot set"]) < 0.6


def test_every_baseline_gives_probabilities_that_grow_with_the_horizon(fitted, held_out) -> None:
    for baseline in fitted.values():
        for forecast in baseline_forecasts(baseline, held_out, NUM_EXPERTS):
            planes = np.stack(forecast[:4])
            assert planes.shape == (4, *SHAPE) and planes.min() >= 0 and planes.max() <= 1
            assert (np.diff(planes[1:], axis=0) > -1e-6).all()


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_answers_are_what_a_search_of_the_coming_tokens_finds(
    length: int, horizon: int, seed: int
) -> None:
    used_TLE = np.random.default_rng(seed).random((length, 2, 3)) < 0.3
    for ahead, answer in zip((0, 1, horizon, 4 * horizon), answers(used_TLE, horizon), strict=True):
        for t in range(length):
            span = used_TLE[t : t + 1] if ahead == 0 else used_TLE[t + 1 : t + 1 + ahead]
            assert np.array_equal(answer[t], span.any(0))


# ------------------------------------------------------------------------------ the timeline


def random_steps(seed: int, count: int = 30, top_k: int = 2) -> list[Calls]:
    generator = np.random.default_rng(seed)
    return [
        [(n, np.sort(generator.permutation(NUM_EXPERTS)[:top_k])) for n in range(NUM_LAYERS)]
        for _ in range(count)
    ]


def forecast_of(calls: Calls, probability: float = 1.0) -> Forecast:
    """A forecast of the experts of this step alone."""
    planes = np.zeros((4, *SHAPE), np.float32)
    for layer, experts in calls:
        planes[0, layer, experts] = probability
    return Forecast(*planes)


@given(st.integers(0, 99), st.integers(4, 20))
def test_without_prefetching_it_loads_what_the_simulation_loads(seed: int, slots: int) -> None:
    steps = random_steps(seed)
    timeline = Timeline(LRU(*SHAPE), SHAPE, slots, MACHINE, "none")
    simulation = Simulation(LRU(*SHAPE), *SHAPE, slots)
    for calls in steps:
        timeline.step(None, calls)
        simulation.step(None, calls)
    counts = timeline.counts
    assert counts.demanded == simulation.loads
    layers = len(steps) * NUM_LAYERS
    assert counts.milliseconds == pytest.approx(2.0 * counts.demanded + 3.0 * layers)


@given(st.integers(0, 99), st.integers(6, 20), st.sampled_from(["priced", "greedy"]))
def test_every_prefetch_is_timely_late_or_wasted_and_saves_a_load_unless_wasted(
    seed: int, slots: int, plan
) -> None:
    steps = random_steps(seed)
    timeline = Timeline(PredictedReuse(*SHAPE, horizon=4), SHAPE, slots, MACHINE, plan)
    for calls in steps:
        timeline.step(forecast_of(calls, 0.9), calls)
    counts = timeline.counts
    assert min(counts.timely, counts.late, counts.wasted) >= 0
    assert counts.prefetched > 0


def test_a_prefetch_that_arrives_while_layers_compute_hides_its_load() -> None:
    calls: Calls = [(0, np.array([1])), (1, np.array([2]))]
    timeline = Timeline(PredictedReuse(*SHAPE, horizon=4), SHAPE, 8, MACHINE, "priced")
    timeline.step(forecast_of(calls), calls)
    assert (timeline.counts.demanded, timeline.counts.timely, timeline.counts.late) == (1, 1, 0)
    assert timeline.counts.milliseconds == pytest.approx(2.0 + 3.0 + 3.0)


def test_a_prefetch_that_is_still_in_transfer_is_late_and_waited_for() -> None:
    calls: Calls = [(0, np.array([1])), (1, np.array([2]))]
    slow = Machine(expert_ms=4.0, layer_ms=3.0)
    timeline = Timeline(PredictedReuse(*SHAPE, horizon=4), SHAPE, 8, slow, "priced")
    timeline.step(forecast_of(calls), calls)
    assert (timeline.counts.timely, timeline.counts.late) == (0, 1)
    assert timeline.counts.milliseconds == pytest.approx(4.0 + 4.0 + 3.0)


def test_a_flat_forecast_is_not_worth_a_prefetch_that_delays_the_next_layer() -> None:
    steps, flat = random_steps(0), Forecast(*np.full((4, *SHAPE), 0.25, np.float32))
    slow = Machine(expert_ms=12.0, layer_ms=3.0)
    times = {}
    for plan in ("none", "priced"):
        timeline = Timeline(PredictedReuse(*SHAPE, horizon=4), SHAPE, 8, slow, plan)
        for calls in steps:
            timeline.step(flat, calls)
        times[plan] = timeline.counts.milliseconds
    assert timeline.counts.prefetched == 0
    assert times["priced"] == times["none"]


# ------------------------------------------------------------------------------ the table


def test_the_recall_of_the_next_token_leaves_out_the_last_of_a_document(held_out) -> None:
    used = np.concatenate([used_by(steps, NUM_EXPERTS) for steps in held_out])
    perfect = [
        Forecast(*np.stack([now, after, now, now]).astype(np.float32))
        for now, after in zip(used, np.roll(used, -1, axis=0), strict=True)
    ]
    scored = predicting("perfect", perfect, held_out, SHAPE, 3)
    assert scored.recall_this == scored.recall_next == 1.0


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("all")
    fit = write_trace(folder / "fit", num_documents=30)
    trace = write_trace(folder / "trace", num_documents=6, seed=5)
    predictor = write_predictor(folder / "ours.onnx", TOPOLOGY)
    out = folder / "all.json"
    arguments = ["--all=true", f"--trace={trace}", f"--fit_trace={fit}", f"--predictor={predictor}"]
    return out, [*arguments, "--residency=[0.25,0.5]", f"--json={out}"]


def test_all_puts_every_contender_on_the_same_tokens(compared, capsys) -> None:
    out, arguments = compared
    run(main, SimulateSettings, arguments, prog="python -m runtime.simulate")
    printed, rows = capsys.readouterr().out, json.loads(out.read_text())["results"]
    names = ["lru", "lfu", "class-lru", "lfru", "reuse", "least-stale", "hot-set", "belady"]
    names += ["uses seen", "static hot set"]
    names += ["previous token", "token table", "nearest maps", "ours"]
    assert [row["name"] for row in rows] == 2 * names
    others = ["lru, one by one", "arc", "s3-fifo", "lfru-layers", "belady+bypass"]
    assert all(name in printed for name in [*names, *others])
    assert printed.count("gap to belady closed: of LRU's, and of that of the best free rule") == 2
    assert printed.count("prefetch on") + printed.count("prefetch off") == 2 * 5
    best = {row["residency"]: row["hit_rate"] for row in rows if row["name"] == "belady"}
    assert all(row["hit_rate"] <= best[row["residency"]] + 1e-9 for row in rows)


def test_predictors_of_the_same_file_name_are_told_apart_by_their_folders(
    compared, tmp_path: Path
) -> None:
    out, arguments = compared
    (tmp_path / "other").mkdir()
    other = write_predictor(tmp_path / "other" / "ours.onnx", TOPOLOGY)
    more = [f"--more_predictors=[{other}]", "--residency=[0.25]"]
    run(main, SimulateSettings, [*arguments, *more], prog="python -m runtime.simulate")
    names = [row["name"] for row in json.loads(out.read_text())["results"]]
    assert names[-1] == str(other) and names[-2] == str(out.parent / "ours.onnx")


def test_all_without_a_trace_to_fit_on_is_one_clear_line(compared, capsys) -> None:
    arguments = [a for a in compared[1] if not a.startswith("--fit_trace")]
    with pytest.raises(SystemExit):
        run(main, SimulateSettings, arguments, prog="python -m runtime.simulate")
    assert "--fit_trace" in capsys.readouterr().err
