"""The comparison: its figures, its split, and the same figures for foreign traces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routing.shards import TraceReader
from routing.writer import TraceWriter
from runtime.cache.policies import FREE_RULES
from runtime.comparison.__main__ import compare_trace
from runtime.comparison.contenders import Field, field_of
from runtime.comparison.figures import ALL, Figures, compare, detailed, of_size
from runtime.comparison.settings import CompareSettings
from runtime.comparison.split import digest, split_trace
from runtime.simulation.comparison import run_contender
from runtime.simulation.link_model import Machine
from tests.helpers.foreign import WITH_IDS, WRITERS
from tests.helpers.predicting import TOPOLOGY, random_document
from trace.formats.importing import import_trace
from trace.formats.settings import ImportSettings

SIZES = [0.25, 0.5]


def settings(trace: Path, **options: Any) -> CompareSettings:
    return CompareSettings(trace=trace, **({"residency": SIZES} | options))


def figures_of(trace: Path, **options: Any) -> list[Figures]:
    chosen = settings(trace, **options)
    with split_trace(TraceReader(trace), chosen) as split:
        return list(compare(field_of(split, chosen), chosen))


def field(trace: Path, **options: Any) -> Field:
    chosen = settings(trace, **options)
    with split_trace(TraceReader(trace), chosen) as split:
        return field_of(split, chosen)


def named(figures: Sequence[Figures], contender: str) -> list[Figures]:
    return [row for row in figures if row.contender == contender]


# -------------------------------------------------------------------- foreign formats


def imported(name: Any, ours: TraceReader, tmp_path: Path) -> Path:
    write, file = WRITERS[name]
    options: dict[str, Any] = {}
    if name not in WITH_IDS:
        ids = [document.token_ids_T for document in ours.documents()]
        np.save(tmp_path / "ids.npy", np.concatenate(ids))
        options["token_ids"] = tmp_path / "ids.npy"
    path = write(ours, tmp_path / file)
    out = tmp_path / "imported"
    import_trace(
        ImportSettings(
            files=[path], format=name, model=str(ours.directory), out=out, label="text", **options
        )
    )
    return out


@pytest.fixture(scope="module")
def one_label(labelled: TraceReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents under one label, as formats without labels have them."""
    directory = tmp_path_factory.mktemp("one") / "trace"
    with TraceWriter(directory, TOPOLOGY, provenance={"model": "rules"}) as writer:
        for document in labelled.documents():
            writer.add({"decoder": document._replace(label="text")})
    return directory


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", list(WRITERS))
def test_a_foreign_trace_gives_the_figures_of_our_own_of_the_same_routes(
    name: str, labelled: TraceReader, one_label: Path, rules_predictor: Path, tmp_path: Path
) -> None:
    """In all five formats, for every rule, baseline and predictor."""
    theirs = imported(name, labelled, tmp_path)
    options = {"predictors": [rules_predictor]}
    figures = figures_of(theirs, **options)
    assert figures == figures_of(one_label, **options)
    assert {"lru", "belady", "token table", "ours"} <= {row.contender for row in figures}
    ours, foreign = TraceReader(one_label), TraceReader(theirs)
    assert digest(ours.documents(), ours) == digest(foreign.documents(), foreign)


def test_without_token_ids_the_rules_have_their_figures_and_predictors_are_refused(
    labelled: TraceReader, one_label: Path, rules_predictor: Path, tmp_path: Path
) -> None:
    path = WRITERS["llama.cpp"][0](labelled, tmp_path / "moe_trace.csv")
    out = tmp_path / "imported"
    import_trace(
        ImportSettings(
            files=[path], format="llama.cpp", model=str(one_label), out=out, label="text"
        )
    )
    rows = [row for row in figures_of(one_label) if row.contender != "token table"]
    assert figures_of(out) == rows
    with pytest.raises(ValueError, match=r"ours\.onnx needs token ids"):
        figures_of(out, predictors=[rules_predictor])


# ------------------------------------------------------------------------- the figures


def test_the_figures_over_all_tokens_are_those_of_the_simulation(
    labelled: TraceReader, rules_predictor: Path
) -> None:
    options = {"predictors": [rules_predictor]}
    played = field(labelled.directory, **options)
    figures = figures_of(labelled.directory, **options)
    machine = Machine(expert_ms=12.6 / 55.0, layer_ms=0.2)
    for contender in played.contenders:
        for row in named(figures, contender.name):
            if row.label != ALL:
                continue
            same = run_contender(contender, played.calls, played.shape, row.residency, machine)
            assert row.hit_rate == pytest.approx(same.hit_rate)
            assert row.mb_per_token == pytest.approx(12.6 * same.loads_per_token)
            assert row.ms_per_token == pytest.approx(same.ms_per_token["none"])
            assert (row.ms_priced is None) == ("priced" not in same.ms_per_token)
            if row.ms_priced is not None:
                assert row.ms_priced == pytest.approx(same.ms_per_token["priced"])
                assert row.wasted_mb == pytest.approx(12.6 * same.wasted)
            if contender.forecasts[0] is not None:
                assert row.recall_at_k == pytest.approx(same.recall_this)


def test_figures_of_labels_add_up_to_those_of_all_tokens(
    labelled: TraceReader, rules_predictor: Path
) -> None:
    figures = figures_of(labelled.directory, predictors=[rules_predictor])
    for row in of_size(figures, SIZES[0]):
        parts = [one for one in named(figures, row.contender) if one.residency == SIZES[0]]
        parts = [one for one in parts if one.label != ALL]
        assert [one.label for one in parts] == ["odd", "even"]
        weights = [one.tokens for one in parts]
        assert sum(weights) == row.tokens
        for name in ("hit_rate", "mb_per_token", "recall_at_k", "recall_at_c", "ms_per_token"):
            values = [getattr(one, name) for one in parts]
            if values[0] is not None:
                average = np.average(values, weights=weights)
                assert average == pytest.approx(getattr(row, name)), name


def test_recall_at_c_grows_with_the_cache_and_recall_at_k_does_not(
    labelled: TraceReader, rules_predictor: Path
) -> None:
    figures = figures_of(
        labelled.directory, predictors=[rules_predictor], residency=[0.25, 0.5, 1.0]
    )
    rows = [row for row in named(figures, "ours") if row.label == ALL]
    assert len({row.recall_at_k for row in rows}) == 1
    at_c = [row.recall_at_c or 0.0 for row in rows]
    assert at_c == sorted(at_c) and at_c[-1] == 1.0
    assert rows[0].recall_at_k == rows[0].recall_at_c  # a quarter of 8 experts are the K used


def test_the_gap_is_that_from_lru_and_from_the_best_free_rule_to_the_optimum(
    labelled: TraceReader,
) -> None:
    for label in (ALL, "odd"):
        rows = of_size(figures_of(labelled.directory), SIZES[1], label)
        rates = {row.contender: row.hit_rate for row in rows}
        best = max(rates[name] for name in FREE_RULES if name in rates)
        for row in rows:
            way = rates["belady"] - best
            assert row.gap_best == pytest.approx((row.hit_rate - best) / way)
        assert next(row for row in rows if row.contender == "belady").gap_lru == 1
        assert next(row for row in rows if row.contender == "lru").gap_lru == 0


def test_an_emptied_cache_begins_every_document_cold(labelled: TraceReader) -> None:
    carried = {row.contender: row for row in of_size(figures_of(labelled.directory), SIZES[1])}
    figures = figures_of(labelled.directory, cache="emptied")
    emptied = {row.contender: row for row in of_size(figures, SIZES[1])}
    assert emptied["lru"].hit_rate < carried["lru"].hit_rate
    assert "belady+bypass" in carried and "belady+bypass" not in emptied
    two = {"cache": "emptied", "document_tokens": 2}
    both, second = (
        figures_of(labelled.directory, **two),
        figures_of(labelled.directory, warm_up=1, **two),
    )
    for one, other in zip(both, second, strict=True):  # all hits are the second tokens'
        assert one.hit_rate == pytest.approx(other.hit_rate / 2)


def test_the_warm_up_is_not_counted(labelled: TraceReader) -> None:
    all_tokens = of_size(figures_of(labelled.directory), SIZES[0])[0]
    warmed = of_size(figures_of(labelled.directory, warm_up=20), SIZES[0])[0]
    assert warmed.tokens == all_tokens.tokens - 20
    assert warmed.hit_rate > all_tokens.hit_rate  # the cache was empty at first
    of_each = of_size(figures_of(labelled.directory, warm_up=2, cache="emptied"), SIZES[0])[0]
    assert of_each.tokens == all_tokens.tokens - 2 * 8
    with pytest.raises(ValueError, match="--warm-up 9999 leaves no token"):
        figures_of(labelled.directory, warm_up=9999)


# --------------------------------------------------------------------------- the split


def test_documents_compared_on_are_not_fitted_on(labelled: TraceReader) -> None:
    with split_trace(labelled, settings(labelled.directory)) as split:
        parts = [
            {digest([document], reader) for document in reader.documents()}
            for reader in (split.compared, split.fit)
        ]
        labels = [sorted(d.label for d in r.documents()) for r in (split.compared, split.fit)]
    assert not parts[0] & parts[1]
    assert labels == [["even"] * 4 + ["odd"] * 4] * 2


def test_shared_documents_of_another_trace_are_left_out_of_the_fit(
    labelled: TraceReader, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    generator = np.random.default_rng(9)
    with TraceWriter(other, TOPOLOGY, provenance={}) as writer:
        for document in [labelled.document(3), random_document(generator, 9)]:
            writer.add({"decoder": document})
    with split_trace(labelled, settings(labelled.directory, fit_trace=other)) as split:
        assert len(split.compared) == len(labelled) and len(split.fit) == 1
        assert split.remarks == ["1 documents are compared on, and so not fitted on"]
    with pytest.raises(ValueError, match="leaves no text to fit the baselines on"):
        figures_of(labelled.directory, document_tokens=1)
    with pytest.raises(ValueError, match="leaves no text to fit the baselines on"):
        figures_of(labelled.directory, fit_trace=labelled.directory)


def test_a_labels_only_document_is_cut_in_two(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    document = random_document(np.random.default_rng(0), 1500)
    with TraceWriter(trace, TOPOLOGY, provenance={}) as writer:
        writer.add({"decoder": document})
    reader = TraceReader(trace)
    with split_trace(reader, settings(trace)) as split:
        compared, fit = split.compared.document(0), split.fit.document(0)
        assert "cut in two: rules" in split.remarks[0]
        assert np.array_equal(compared.experts_TLK, document.experts_TLK[750:])
        assert np.array_equal(fit.experts_TLK, document.experts_TLK[:750])


def test_every_label_has_its_share_however_few_tokens_there_are(labelled: TraceReader) -> None:
    chosen = settings(labelled.directory, max_tokens=21, document_tokens=8)
    with split_trace(labelled, chosen) as split:
        lengths = [(d.label, len(d.token_ids_T)) for d in split.compared.documents()]
    assert lengths == [("odd", 8), ("even", 8), ("odd", 3), ("even", 3)]


def test_a_label_called_all_is_told_apart_from_all_tokens(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    with TraceWriter(tmp_path / "trace", TOPOLOGY, provenance={}) as writer:
        for number in range(8):
            label = "all" if number % 2 else "other"
            writer.add({"decoder": random_document(generator, 9)._replace(label=label)})
    rows = named(figures_of(tmp_path / "trace", residency=[0.5]), "lru")
    assert [(row.label, row.tokens) for row in rows] == [
        ("all", 36), ("other", 18), ("all (label)", 18),
    ]  # fmt: skip


def test_a_cache_too_small_for_one_layer_is_refused(labelled: TraceReader) -> None:
    with pytest.raises(ValueError, match=r"--residency 0\.05 is 1 of 3 x 8 .* needs 2 at once"):
        figures_of(labelled.directory, residency=[0.05])


# ------------------------------------------------------------------------- the command


def test_the_command_writes_figures_picture_and_leaderboard(
    labelled: TraceReader, rules_predictor: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = {
        "json": tmp_path / "figures.json", "plot": tmp_path / "figures.png",
        "leaderboard": tmp_path / "board.json", "predictors": [rules_predictor],
    }  # fmt: skip
    compare_trace(settings(labelled.directory, **options))
    shown = capsys.readouterr().out
    for word in ("recall@K", "recall@C", "gap, best", "ours by label", "timely", "even"):
        assert word in shown
    entries = json.loads((tmp_path / "figures.json").read_text())["entries"]
    assert json.loads((tmp_path / "board.json").read_text())["entries"] == entries
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_figures_by_label_are_printed_of_the_contenders_asked_for(labelled: TraceReader) -> None:
    figures = figures_of(labelled.directory)
    chosen = settings(labelled.directory, detailed=["lru", "belady"])
    assert detailed(figures, chosen) == ["lru", "belady"]
    with pytest.raises(ValueError, match="no contender nonsense, but lru"):
        detailed(figures, settings(labelled.directory, detailed=["nonsense"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warm_up": -1}, "warm_up must not be negative"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"expert_mb": 0.0}, "expert_mb must be above 0"),
        ({"residency": [1.5]}, r"residency \[1.5\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(Path("trace"), **options)
