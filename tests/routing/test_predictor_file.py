"""routing.predictor_file: one way to open a predictor, to feed it, and to keep its past."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from routing.predictor_file.driver import Past, not_used, run_step, run_steps
from routing.predictor_file.format import FAR, HEADS, METADATA_KEY, OLDEST_HEADS, PADDING
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.topology import NO_EXPERT
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import NUM_EXPERTS, NUM_LAYERS, TOP_K, TOPOLOGY, VOCAB_SIZE

WINDOW = 6


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> PredictorFile:
    path = tmp_path_factory.mktemp("onnx") / "predictor.onnx"
    return open_predictor(write_predictor(path, TOPOLOGY, window=WINDOW))


def no_routes(*shape: int) -> np.ndarray:
    return np.full((*shape, NUM_LAYERS, TOP_K), NO_EXPERT, np.int64)


def read(file: PredictorFile, past: Past, token_ids_T: np.ndarray) -> list[np.ndarray]:
    """The heads of one sequence's tokens, read one after the other."""
    steps = []
    for token in token_ids_T:
        positions_11 = np.array([[past.length]])
        steps.append(run_step(file, past, np.array([[token]]), no_routes(1, 1), positions_11))
    return [np.concatenate(parts, 1) for parts in zip(*steps, strict=True)]


def test_the_ring_holds_the_newest_tokens_of_its_size_and_no_others(file: PredictorFile) -> None:
    past = Past(file, 1, 4)
    read(file, past, np.arange(11) % VOCAB_SIZE)
    assert (past.size, past.used, past.length) == (4, 4, 11)
    assert sorted(past.positions[0].tolist()) == [7, 8, 9, 10]
    assert Past(file, 1, 100).size == WINDOW, "a graph never sees more than its window"


def test_an_empty_past_has_no_positions(file: PredictorFile) -> None:
    past = Past(file, 3)
    assert past.used == 0
    assert (past.positions == PADDING).all() and not past.past.any()


def test_sequences_side_by_side_are_predicted_as_each_alone(file: PredictorFile) -> None:
    rng = np.random.default_rng(0)
    lengths, sizes = (1, 5, 17), (100, 3, 100)
    texts = [rng.integers(VOCAB_SIZE, size=length + 9) for length in lengths]
    together = [Past(file, 1, size) for size in sizes]
    alone = [Past(file, 1, size) for size in sizes]
    for text, length, past, other in zip(texts, lengths, together, alone, strict=True):
        read(file, past, text[:length])
        read(file, other, text[:length])
    for step in range(9):
        tokens = [text[length + step] for text, length in zip(texts, lengths, strict=True)]
        heads = run_steps(file, together, np.array(tokens)[:, None], no_routes(3, 1))
        for index, (past, token) in enumerate(zip(alone, tokens, strict=True)):
            for joint, own in zip(heads, read(file, past, np.array([token])), strict=True):
                np.testing.assert_array_equal(joint[index], own[0])
    for past, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(past.past, other.past)
        np.testing.assert_array_equal(past.positions, other.positions)


def test_a_file_without_a_far_head_is_given_far_independent_horizons(tmp_path: Path) -> None:
    path = write_predictor(tmp_path / "old.onnx", TOPOLOGY, without=[HEADS[-1]])
    file = open_predictor(path)
    assert file.outputs == OLDEST_HEADS
    routes = np.arange(6 * NUM_LAYERS * TOP_K).reshape(1, 6, NUM_LAYERS, TOP_K) % NUM_EXPERTS
    heads = run_step(file, Past(file, 1), np.arange(6)[None], routes, np.arange(6)[None])
    horizon, far = heads[2], heads[3]
    assert len(heads) == len(HEADS) and far.dtype == np.float32
    np.testing.assert_allclose(not_used(far), not_used(horizon) ** FAR, atol=1e-6)


class Answers:
    """A session whose horizon head answers with given logits."""

    def __init__(self, logits: list[float]) -> None:
        self._logits = np.array(logits, np.float32).reshape(1, 1, 1, -1)

    def run(self, names: list[str], _: dict[str, np.ndarray]) -> list[np.ndarray]:
        present = np.zeros((1, 2, 1, 1, 1, NUM_EXPERTS), np.float32)
        return [self._logits if name in HEADS else present for name in names]


@pytest.mark.filterwarnings("error")
def test_the_far_head_of_an_older_file_is_exact_for_extreme_logits(file: PredictorFile) -> None:
    older = file._replace(session=Answers([-np.inf, -60, 0, 60, np.inf]), outputs=OLDEST_HEADS)
    position = np.zeros((1, 1), np.int64)
    far = run_step(older, Past(older, 1), position, no_routes(1, 1), position)[-1].ravel()
    assert far[0] == -np.inf and far[4] == np.inf
    assert far[1] == pytest.approx(-60 + np.log(FAR), abs=1e-4)
    assert far[2] == pytest.approx(np.log(2**FAR - 1), abs=1e-5)
    assert far[3] == pytest.approx(60 * FAR, rel=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_logit_that_is_no_number_counts_as_not_used() -> None:
    logits = np.array([np.nan, -np.inf, 0, np.inf, 200], np.float32)
    assert not_used(logits).tolist() == [1, 1, 0.5, 0, 0]


def changed(path: Path, target: Path, **changes: Any) -> Path:
    """A copy whose metadata has other values."""
    model = onnx.load(path)
    meta = json.loads(next(p.value for p in model.metadata_props if p.key == METADATA_KEY))
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(meta | changes)})
    onnx.save(model, target)
    return target


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"schema": 2}, "schema 2; this version reads schema 1"),
        ({"window": 0}, "window 0 and horizon 4 are not positive"),
        ({"stack": "encoder"}, "no 'encoder' MoE stack"),
        ({"topology": {}}, "not a routing topology"),
    ],
)
def test_metadata_of_another_form_are_refused_by_the_files_name(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = write_predictor(tmp_path / "good.onnx", TOPOLOGY)
    bad = changed(path, tmp_path / "bad.onnx", **changes)
    with pytest.raises(ValueError, match=r"bad\.onnx has damaged predictor metadata") as refused:
        open_predictor(bad)
    assert complaint in str(refused.value)


def test_an_onnx_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = write_predictor(tmp_path / "other.onnx", TOPOLOGY)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"other\.onnx .*not one that predictor\.export wrote"):
        open_predictor(path)


@pytest.mark.parametrize("cache", [True, False])
def test_a_predictor_says_whether_it_has_a_key_value_cache(cache: bool, tmp_path: Path) -> None:
    file = open_predictor(write_predictor(tmp_path / "p.onnx", TOPOLOGY, cache=cache))
    assert file.cached == cache
    assert file.cache_shape == ((1, 1, NUM_EXPERTS) if cache else (0, 0, 0))
    assert file.outputs == HEADS
