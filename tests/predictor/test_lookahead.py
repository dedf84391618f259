"""Look-ahead networks: their inputs, their training, and the traces they annotate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from predictor.layer_ahead import main
from predictor.lookahead.networks import LookAheadNetworks
from predictor.lookahead.router_inputs import load_model, router_inputs
from predictor.lookahead.settings import LayerAheadSettings
from routing.cli import run
from routing.lookahead import recall_ahead
from routing.shards import Document, TraceReader, signed_experts
from tests.helpers.predicting import write_trace
from tests.helpers.tiny import save_tiny
from tests.helpers.tracing import assert_same_documents, trace, write_texts


def words(seed: int, count: int) -> list[str]:
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh ."))
    return ["".join(random.choice(letters, 60)) for _ in range(count)]


class Traced:
    """A tiny model and two traces of different text; the second holds a look-ahead by gates."""

    def __init__(self, folder: Path) -> None:
        self.model = save_tiny(folder / "model", "olmoe")
        self.training, self.other = folder / "training", folder / "other"
        texts = (
            write_texts(folder / "a.txt", words(0, 60)),
            write_texts(folder / "b.txt", words(1, 8)),
        )
        trace(self.model, texts[0], self.training)
        trace(self.model, texts[1], self.other, weights=True, lookahead=1)

    def settings(self, out: Path, **options: Any) -> LayerAheadSettings:
        defaults: dict[str, Any] = {
            "model": str(self.model), "trace": [self.training], "annotate": [self.other],
            "out": out, "depth": 2, "width": 32, "batch_tokens": 64, "model_tokens": 256,
            "passes": 6,
        }  # fmt: skip
        return LayerAheadSettings(**defaults | options)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(tmp_path_factory.mktemp("ahead"))


@pytest.fixture(scope="module")
def annotated(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    main(traced.settings(out))
    return out / "other"


def used_by(document: Document) -> np.ndarray:
    return signed_experts(document.experts_TLK, 8)


def test_networks_predict_the_experts_of_held_out_text(traced: Traced, annotated: Path) -> None:
    documents = list(TraceReader(annotated).documents())
    recalls = [recall_ahead(d.lookahead["mlp"], used_by(d)) for d in documents]
    said = np.concatenate([used_by(d) for d in TraceReader(traced.training).documents()])
    most_used = [recall_of_the_most_used(said, used_by(d)) for d in documents]
    assert (np.mean(recalls, axis=0) > np.mean(most_used) + 0.05).all()


def test_linear_networks_look_ahead_under_a_name_of_their_own(
    traced: Traced, annotated: Path, tmp_path: Path
) -> None:
    main(traced.settings(tmp_path, width=0, annotate=[annotated], passes=2))
    reader = TraceReader(tmp_path / "other", verify=True)
    assert reader.lookahead == {"gate": 1, "mlp": 2, "linear": 2}
    recalls = [recall_ahead(d.lookahead["linear"], used_by(d)) for d in reader.documents()]
    assert (np.mean(recalls, axis=0) > 2 / 8).all(), "better than chance"


def recall_of_the_most_used(training_TLK: np.ndarray, used_TLK: np.ndarray) -> float:
    """Recall of the two experts of each layer that are used most in training."""
    counts = [np.bincount(training_TLK[:, layer].ravel(), minlength=8) for layer in range(4)]
    top = [np.argsort(-count)[:2] for count in counts]
    return float(np.mean([np.isin(used_TLK[:, n], top[n]).mean() for n in range(4)]))


def test_an_annotated_copy_keeps_everything_else_in_the_trace(
    traced: Traced, annotated: Path
) -> None:
    before, after = TraceReader(traced.other), TraceReader(annotated, verify=True)
    assert_same_documents(list(before.documents()), list(after.documents()))
    assert (before.lookahead, after.lookahead) == ({"gate": 1}, {"gate": 1, "mlp": 2})
    for ours, theirs in zip(after.documents(), before.documents(), strict=True):
        for field in ("experts_TLDM", "scores_TLDM"):
            arrays = [getattr(d.lookahead["gate"], field) for d in (ours, theirs)]
            assert np.array_equal(*arrays)
    assert after.provenance["layer_ahead"]["trace"] == str([traced.training])


def test_router_inputs_are_the_same_in_a_batch_and_alone(traced: Traced) -> None:
    reader = TraceReader(traced.training)
    model = load_model(str(traced.model), reader.topology, device="cpu")
    documents = [reader.document(index) for index in range(5)]
    ids = [document.token_ids_T[: 9 + 7 * n] for n, document in enumerate(documents)]
    (together,) = router_inputs(model, [ids])
    alone = list(router_inputs(model, [[one] for one in ids]))
    torch.testing.assert_close(
        together.hidden_LNH, torch.cat([x.hidden_LNH for x in alone], 1), atol=1e-4, rtol=1e-4
    )
    traced_NLK = np.concatenate([used_by(d)[: len(i)] for d, i in zip(documents, ids, strict=True)])
    assert np.array_equal(together.experts_LNK.transpose(0, 1).numpy(), traced_NLK)
    assert not any(module._forward_pre_hooks for module in model.modules())


@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 99))
def test_predicted_experts_are_distinct_and_end_with_the_last_layer(
    num_layers: int, depth: int, seed: int
) -> None:
    torch.manual_seed(seed)
    networks = LookAheadNetworks(num_layers, 8, 2, hidden=4, width=3, depth=depth)
    torch.nn.init.normal_(networks.direct_LHO)
    said = networks.predict(torch.randn(num_layers, 5, 4))
    assert said.experts_TLDM.shape == (5, num_layers, depth, 4)
    for layer in range(num_layers):
        for distance in range(1, depth + 1):
            there = said.scores_TLDM[:, layer, distance - 1] > -np.inf
            assert there.all() if layer + distance < num_layers else not there.any()
    assert (np.diff(np.sort(said.experts_TLDM.astype(int), axis=-1), axis=-1) > 0).all()


def test_no_layer_learns_from_layers_beyond_the_last() -> None:
    networks = LookAheadNetworks(3, 8, 2, hidden=4, width=3, depth=2)
    networks.loss(torch.randn(3, 5, 4), torch.randint(8, (3, 5, 2))).backward()
    assert networks.direct_LHO.grad is not None
    near_LHE, far_LHE = networks.direct_LHO.grad.split(8, dim=-1)
    assert near_LHE[:2].any() and far_LHE[0].any()
    assert not near_LHE[2].any() and not far_LHE[1:].any()


def said_by_the_command(settings: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        run(main, LayerAheadSettings, settings, prog="layer_ahead")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    return str(said)


def test_mistakes_are_one_line_before_any_training(
    traced: Traced, annotated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(training: Path, other: Path, out: Path) -> list[str]:
        options = {"model": traced.model, "out": out}
        words = [f"--{name}={value}" for name, value in options.items()]
        return [*words, "--trace", str(training), "--annotate", str(other)]

    same = command(traced.training, traced.training, tmp_path)
    assert "both trained on and annotated" in said_by_the_command(same, capsys)
    again = command(traced.training, traced.other, annotated.parent)
    assert "exists already" in said_by_the_command(again, capsys)
    rules = write_trace(tmp_path / "rules", num_documents=3)
    others = command(rules, write_trace(tmp_path / "more", num_documents=3), tmp_path / "out")
    said = said_by_the_command(others, capsys)
    assert "olmoe" in said and "rules" in said
