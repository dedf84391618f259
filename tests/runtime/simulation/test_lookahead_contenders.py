"""Look-ahead in the simulator: calibration, timeliness, and what is known when."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.cli import run
from routing.lookahead import LookAhead
from routing.shards import Document, TraceReader, signed_experts
from routing.writer import TraceWriter
from runtime.cache.belady import Calls
from runtime.cache.forecast import Forecast
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.simulate import main
from runtime.simulation.calibration import Calibration, Joint
from runtime.simulation.link_model import Machine, Timeline, TimelineCounts
from runtime.simulation.settings import SimulateSettings
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import NUM_EXPERTS, NUM_LAYERS, TOP_K, TOPOLOGY, write_trace

SHAPE = NUM_LAYERS, NUM_EXPERTS
DEPTH = 2


def mostly_right_look_ahead(used_TLK: np.ndarray, wrong: float, seed: int) -> LookAhead:
    """Names the experts used; on a share `wrong` of tokens, other experts with low scores."""
    random = np.random.default_rng(seed)
    length = len(used_TLK)
    size = (length, NUM_LAYERS, DEPTH)
    chance = random.random((*size, NUM_EXPERTS))
    erring = random.random(size) < wrong
    for distance in range(1, DEPTH + 1):
        for source in range(NUM_LAYERS - distance):
            rows = np.flatnonzero(~erring[:, source, distance - 1])
            chance[rows[:, None], source, distance - 1, used_TLK[rows, source + distance]] += 1
    order = np.argsort(-chance, axis=-1)[..., : 2 * TOP_K]
    scores = np.where(np.arange(2 * TOP_K) < TOP_K, 3.0, 0.0) * np.where(erring, 0.1, 1)[..., None]
    beyond = np.arange(NUM_LAYERS)[:, None] + np.arange(1, DEPTH + 1) >= NUM_LAYERS
    scores = np.where(beyond[:, :, None], -np.inf, scores)
    return LookAhead(order.astype(np.uint8), scores.astype(np.float16))


def used_in(experts_TLK: np.ndarray) -> np.ndarray:
    return (experts_TLK[..., None] == np.arange(NUM_EXPERTS)).any(2)


def random_routes(length: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.argsort(random.random((length, *SHAPE)), axis=-1)[..., :TOP_K]


# ------------------------------------------------------------------------------ calibration


@given(st.integers(20, 60), st.floats(0, 1), st.integers(0, 99))
def test_calibrated_probabilities_add_up_to_the_experts_used(
    length: int, wrong: float, seed: int
) -> None:
    routes_TLK = random_routes(length, seed)
    ahead = mostly_right_look_ahead(routes_TLK, wrong, seed)
    probability = Calibration(ahead, used_in(routes_TLK), TOP_K).probabilities(ahead)
    assert probability.shape == (length, NUM_LAYERS, DEPTH, NUM_EXPERTS)
    assert probability.min() >= 0 and probability.max() <= 1
    assert not probability[:, 2].any() and not probability[:, 1, 1].any()  # beyond the last layer
    sums = probability.astype(np.float32).sum(-1)[:, :1].mean(0)
    assert np.abs(sums - TOP_K).max() < 0.9  # each bin begins with half a use


def test_a_confident_look_ahead_is_trusted_and_an_unsure_one_is_not() -> None:
    routes_TLK = random_routes(4000, 0)
    ahead = mostly_right_look_ahead(routes_TLK, 0.5, 0)
    used_TLE = used_in(routes_TLK)
    probability = Calibration(ahead, used_TLE, TOP_K).probabilities(ahead)[:, 0, 0]
    sure = ahead.scores_TLDM[:, 0, 0, 0] == 3.0
    assert probability[sure][used_TLE[sure, 1]].min() > 0.9
    assert 0.1 < probability[~sure].max(-1).mean() < 0.5


def test_a_predictor_and_a_look_ahead_together_beat_either_alone() -> None:
    random = np.random.default_rng(0)
    used_TLE = used_in(random_routes(3000, 1))
    signal = np.where(used_TLE, 1.0, -1.0)
    views = [
        1 / (1 + np.exp(-(2 * signal + 2 * random.normal(size=signal.shape)))) for _ in range(2)
    ]
    ahead = np.zeros((3000, NUM_LAYERS, DEPTH, NUM_EXPERTS), np.float16)
    for distance in range(1, DEPTH + 1):
        ahead[:, :-distance, distance - 1] = views[0][:, distance:]
    both = Joint(ahead, views[1], used_TLE).probabilities(ahead, views[1])

    def loss(p: np.ndarray) -> float:
        p = np.clip(p.astype(np.float64), 1e-3, 1 - 1e-3)
        return float(-np.where(used_TLE[:, 1:], np.log(p), np.log(1 - p)).mean())

    assert loss(both[:, :-1, 0]) < min(loss(view[:, 1:]) for view in views) - 0.05


# ------------------------------------------------------------------------------ the policy


@given(st.integers(0, 99), st.integers(0, NUM_LAYERS - 1))
def test_revealing_what_the_policy_expects_itself_changes_no_value(seed: int, layer: int) -> None:
    random = np.random.default_rng(seed)
    forecast = Forecast(*np.sort(random.random((4, *SHAPE)).astype(np.float32), axis=0))
    policy = PredictedReuse(*SHAPE, horizon=3)
    policy.begin_step(forecast)
    before = policy.values.copy()
    policy.reveal(layer, policy.expected.this_LE[layer])
    np.testing.assert_allclose(policy.values, before, rtol=1e-5)


def test_an_expert_predicted_by_a_look_ahead_outlives_all_experts_used_before() -> None:
    policy = PredictedReuse(*SHAPE, horizon=3)
    for _ in range(50):
        policy.begin_step(None)
        policy.touch(2, np.array([0, 1, 2]))
    policy.begin_step(None)
    policy.reveal(2, np.eye(NUM_EXPERTS)[5] * 0.95)
    assert policy.values.reshape(SHAPE)[2].argmax() == 5


# ------------------------------------------------------------------------------ the timeline


def ahead_of(calls: Calls, depth: int) -> np.ndarray:
    """A certain look-ahead over the next `depth` layers of one step."""
    ahead = np.zeros((NUM_LAYERS, depth, NUM_EXPERTS), np.float16)
    for layer, experts in calls:
        for distance in range(1, min(depth, layer) + 1):
            ahead[layer - distance, distance - 1, experts] = 1.0
    return ahead


def decode(calls: Calls, depth: int, machine: Machine, *, resident: Calls = ()) -> TimelineCounts:
    """Decode one step, after another has left `resident` in a cache that fits all experts."""
    policy = PredictedReuse(*SHAPE, horizon=3)
    timeline = Timeline(policy, SHAPE, NUM_LAYERS * NUM_EXPERTS, machine, "priced")
    timeline.step(None, resident)
    timeline.counts = TimelineCounts()
    timeline.step(None, calls, ahead_of(calls, depth))
    return timeline.counts


STEP: Calls = [(0, np.array([1, 2])), (1, np.array([3, 4])), (2, np.array([5, 6]))]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_fast_link_hides_all_loads_but_the_first_layers(depth: int) -> None:
    counts = decode(STEP, depth, Machine(expert_ms=0.1, layer_ms=3.0))
    assert (counts.demanded, counts.timely, counts.late, counts.wasted) == (2, 4, 0, 0)
    assert counts.milliseconds == pytest.approx(0.2 + 3 * 3.0)


def test_no_expert_of_a_layer_is_prefetched_before_a_router_input_predicts_it() -> None:
    """The link is idle while layer 0 computes, but depth 1 sees no farther than layer 1."""
    machine = Machine(expert_ms=2.5, layer_ms=3.0)
    near = decode(STEP, 1, machine, resident=STEP[:2])
    assert (near.timely, near.late) == (1, 1)  # both are prefetched while layer 1 computes
    assert near.milliseconds == pytest.approx(3 + 5 + 3)
    far = decode(STEP, 2, machine, resident=STEP[:2])
    assert (far.timely, far.late) == (2, 0)
    assert far.milliseconds == pytest.approx(9.0)


def test_a_look_ahead_that_comes_too_late_is_late_and_waited_for() -> None:
    counts = decode(STEP[:2], 1, Machine(expert_ms=4.0, layer_ms=3.0), resident=STEP[:1])
    assert (counts.demanded, counts.timely, counts.late) == (1, 0, 1)
    assert counts.milliseconds == pytest.approx(4 + 4 + 3)


def test_a_nearer_layers_look_ahead_replaces_that_of_a_farther_one() -> None:
    """From layer 0 expert 5 of layer 2 looks certain; layer 1 corrects that."""
    calls: Calls = [(0, np.array([1])), (1, np.array([3])), (2, np.array([6]))]
    ahead = ahead_of(calls, 2)
    ahead[0, 1], ahead[1, 0] = np.eye(NUM_EXPERTS)[5], 0.0
    policy, machine = PredictedReuse(*SHAPE, horizon=3), Machine(expert_ms=3.0, layer_ms=3.0)
    timeline = Timeline(policy, SHAPE, 24, machine, "priced")
    timeline.step(None, calls, ahead)
    counts = (
        timeline.counts
    )  # while layer 0 computes expert 3 crosses, and then there is time for 5
    assert (counts.demanded, counts.prefetched, counts.timely) == (2, 1, 1)


# ------------------------------------------------------------------------------ the command


def with_look_ahead(directory: Path, out: Path, wrong: float) -> Path:
    reader = TraceReader(directory)
    with TraceWriter(out, TOPOLOGY, provenance={}, lookahead={"gate": DEPTH}) as writer:
        for seed, document in enumerate(reader.documents()):
            writer.add({"decoder": _with(document, wrong, seed)})
    return out


def _with(document: Document, wrong: float, seed: int) -> Document:
    routes_TLK = signed_experts(document.experts_TLK, NUM_EXPERTS).astype(np.int64)
    return document._replace(lookahead={"gate": mostly_right_look_ahead(routes_TLK, wrong, seed)})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("all")
    fit = with_look_ahead(write_trace(folder / "f", num_documents=20), folder / "fit", 0.2)
    trace = with_look_ahead(write_trace(folder / "t", num_documents=6, seed=5), folder / "t2", 0.2)
    predictor = write_predictor(folder / "ours.onnx", TOPOLOGY)
    words = ["--all", f"--trace={trace}", f"--fit_trace={fit}", f"--predictor={predictor}"]
    files = [f"--json={folder / 'all.json'}", f"--plot={folder / 'all.png'}"]
    return folder, [*words, "--residency", "0.25", *files]


def test_look_aheads_of_a_trace_join_the_comparison(compared, capsys) -> None:
    folder, words = compared
    run(main, SimulateSettings, words, prog="simulate")
    rows = {row["name"]: row for row in json.loads((folder / "all.json").read_text())["results"]}
    near, far, both = rows["gate, 1 ahead"], rows["gate, 2 ahead"], rows["ours + gate"]
    assert len(near["recall_ahead"]) == 1 and len(far["recall_ahead"]) == 2
    assert 0.7 < near["recall_ahead"][0] == far["recall_ahead"][0] < 0.95
    assert both["recall_ahead"][0] >= near["recall_ahead"][0] - 0.02
    for row in (near, far):
        assert row["recall_this"] is None and row["recall_next"] is None
        assert row["ms_per_token"]["priced"] < row["ms_per_token"]["none"]
        assert row["hit_rate"] <= rows["belady"]["hit_rate"] + 1e-9
    assert "recall of the experts of a coming layer" in capsys.readouterr().out
    assert (folder / "all.png").read_bytes().startswith(b"\x89PNG")


def test_a_look_ahead_that_cannot_be_calibrated_is_left_out_with_a_message(
    compared, capsys
) -> None:
    folder, words = compared
    plain = [word for word in words if not word.startswith("--fit_trace")]
    run(main, SimulateSettings, [*plain, f"--fit_trace={folder / 'f'}"], prog="simulate")
    printed = capsys.readouterr().out
    assert "without look-ahead by gate" in printed and "gate, 1 ahead" not in printed
