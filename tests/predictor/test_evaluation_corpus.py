"""predictor.evaluate: what is scored is held out, labelled, and counted alike on any machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import predictor.evaluation.scoring as scoring
from predictor.evaluate import evaluate
from predictor.evaluation.corpus import Corpus, shared_documents
from predictor.evaluation.scoring import all_contenders, score
from predictor.evaluation.settings import EvaluateSettings
from predictor.networks.targets import targets
from predictor.training.metrics import route_metrics
from routing.predictor_file.format import HEADS
from routing.shards import Document, TraceReader
from routing.writer import TraceWriter
from tests.helpers.predicting import TOPOLOGY, random_document, write_trace


def documents(seed: int, lengths: Sequence[int], label: str = "rules") -> list[Document]:
    generator = np.random.default_rng(seed)
    return [random_document(generator, length)._replace(label=label) for length in lengths]


def write(directory: Path, found: Sequence[Document]) -> Path:
    with TraceWriter(directory, TOPOLOGY, provenance={}, shard_tokens=100) as writer:
        for document in found:
            writer.add({"decoder": document})
    return directory


def cut(document: Document, length: int) -> Document:
    return document._replace(
        token_ids_T=document.token_ids_T[:length],
        experts_TLK=document.experts_TLK[:length],
        phase_T=document.phase_T[:length],
    )


def test_documents_that_both_traces_hold_are_left_out_with_a_warning(tmp_path: Path) -> None:
    ours, theirs = documents(1, [30, 20, 25]), documents(2, [30, 40])
    trace = write(tmp_path / "trace", [ours[0], theirs[0], ours[1], ours[2]])
    fit = write(tmp_path / "fit", [*theirs, ours[1]])
    out = tmp_path / "figures.json"
    with pytest.warns(UserWarning, match=rf"2 of the 4 documents of {trace} are in {fit} \(--fit"):
        evaluate(EvaluateSettings(trace=trace, fit_trace=fit, json=out))
    assert json.loads(out.read_text())["tokens"] == 30 + 25


def test_a_trace_that_is_wholly_in_the_other_is_refused(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace", num_documents=4)
    with pytest.raises(ValueError, match=r"every document of .* is in .* \(--fit_trace\) too"):
        evaluate(EvaluateSettings(trace=trace, fit_trace=trace))


def test_a_document_is_known_again_where_one_trace_cut_it_shorter(tmp_path: Path) -> None:
    whole = documents(3, [60, 15, 60])
    long = TraceReader(write(tmp_path / "long", whole))
    short = TraceReader(write(tmp_path / "short", [cut(document, 20) for document in whole[:2]]))
    assert shared_documents(long, short) == {0, 1}
    assert shared_documents(short, long) == {0, 1}


def test_traces_without_a_common_document_are_compared_in_silence(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trace = write_trace(tmp_path / "a", num_documents=5, seed=1)
    fit = write_trace(tmp_path / "b", num_documents=5, seed=2)
    evaluate(EvaluateSettings(trace=trace, fit_trace=fit))
    assert not [w for w in recwarn if "fit_trace" in str(w.message)]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Documents of three labels; one-token documents have no next token."""
    found = [
        document
        for n, label in enumerate(("law", "sport", "law", "chess"))
        for document in documents(n, [1, 30, 7], label)
    ]
    return write(tmp_path / "labelled", found)


@pytest.mark.parametrize("cores", [1, 5])
def test_figures_by_label_and_in_all_are_those_of_one_pass(
    labelled: Path, tmp_path: Path, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "available_cores", lambda: cores)
    monkeypatch.setattr(scoring, "GROUP_TOKENS", 20)
    reader = TraceReader(labelled)
    fit = TraceReader(write_trace(tmp_path / "fit", num_documents=5))
    settings = EvaluateSettings(trace=labelled)
    contenders, shape = all_contenders([], Corpus(fit, range(5)), settings)
    corpus = Corpus(reader, range(len(reader)))
    scores = score(contenders, corpus, shape, [])
    assert scores.tokens == {"law": 76, "sport": 38, "chess": 38}
    for contender, result in zip(contenders, scores.results, strict=True):
        for label in (None, *scores.tokens):
            metrics = {head: route_metrics(reader.stack) for head in HEADS}
            for index in corpus.indices:
                if label in (None, reader.labels[reader.doc_labels[index]]):
                    batch = corpus.batch(index)
                    answers = targets(batch, shape)
                    parts = zip(HEADS, contender.predict(batch), answers, strict=True)
                    for head, logits, answer in parts:
                        rows = answer.valid_BT
                        metrics[head].update(logits[rows], answer.used_BTLE[rows])
            figures = result.heads if label is None else result.labels[label]
            for head, metric in metrics.items():
                for name, value_L in metric.compute().items():
                    assert figures[head][name] == pytest.approx(
                        value_L.tolist(), rel=1e-6, abs=1e-9
                    )


def test_figures_do_not_depend_on_the_number_of_cores(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "GROUP_TOKENS", 20)
    fit, reports = write_trace(tmp_path / "fit", num_documents=5), []
    for cores in (1, 4):
        monkeypatch.setattr(scoring, "available_cores", lambda cores=cores: cores)
        out = tmp_path / f"{cores}.json"
        evaluate(EvaluateSettings(trace=labelled, fit_trace=fit, json=out))
        reports.append(out.read_text())
    assert reports[0] == reports[1]


def test_every_label_has_its_row_and_its_figures(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, out = write_trace(tmp_path / "fit", num_documents=5), tmp_path / "figures.json"
    evaluate(EvaluateSettings(trace=labelled, fit_trace=fit, json=out))
    printed = capsys.readouterr().out
    assert "by label" in printed
    assert all(label in printed for label in ("law", "sport", "chess"))
    report = json.loads(out.read_text())
    assert report["labels"] == {"law": 76, "sport": 38, "chess": 38}
    for row in report["predictors"]:
        assert set(row["labels"]) == {"law", "sport", "chess"}
        assert row["labels"]["law"]["this"]["recall"] is not None
