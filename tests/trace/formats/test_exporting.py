"""Traces as tables: what is in the trace is in the Parquet file and in the data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from routing.shards import TraceReader, signed_experts
from routing.topology import Topology
from routing.trace_format.extras import Extras, RouterLogits
from routing.writer import TraceWriter
from tests.helpers.predicting import NUM_EXPERTS, NUM_LAYERS, TOPOLOGY, random_document
from trace.formats import exporting
from trace.formats.exporting import TOPOLOGY as TOPOLOGY_KEY
from trace.formats.exporting import export_trace, to_dataset
from trace.formats.settings import ExportSettings

M, HIDDEN_SIZE = 3, 4


@pytest.fixture
def trace(tmp_path: Path) -> TraceReader:
    """Three documents with everything that a trace can hold; one has a token without expert."""
    generator = np.random.default_rng(0)
    extras = Extras(router_logits=M, hidden=(0, 2), hidden_size=HIDDEN_SIZE)
    with TraceWriter(
        tmp_path / "trace", TOPOLOGY, provenance={"model": "rules"}, with_weights=True,
        extras=extras,
    ) as writer:  # fmt: skip
        for length in (5, 1, 9):
            document = random_document(generator, length, 3)
            document.experts_TLK[0, 0, 1] = 255
            experts_TLM = np.tile(np.arange(M, dtype=np.uint8), (length, NUM_LAYERS, 1))
            logits_TLM = generator.random((length, NUM_LAYERS, M)).astype(np.float16)
            hidden = {
                layer: generator.random((length, HIDDEN_SIZE)).astype(np.float16)
                for layer in (0, 2)
            }
            writer.add(
                {"decoder": document._replace(
                    label=f"kind {length}",
                    weights_TLK=generator.random(document.experts_TLK.shape).astype(np.float16),
                    router=RouterLogits(experts_TLM, logits_TLM),
                    hidden=hidden,
                )}
            )  # fmt: skip
    return TraceReader(tmp_path / "trace", verify=True)


def experts_of(value: Any) -> np.ndarray:
    """Nested lists as signed ids."""
    return np.array(
        [[[-1 if e is None else e for e in layer] for layer in token] for token in value]
    )


def check_documents(rows: list[dict[str, Any]], trace: TraceReader) -> None:
    assert [row["document"] for row in rows] == [0, 1, 2]
    for row, document in zip(rows, trace.documents(), strict=True):
        assert row["label"] == document.label
        assert row["token_ids"] == document.token_ids_T.tolist()
        assert row["phase"] == document.phase_T.tolist()
        signed = signed_experts(document.experts_TLK, NUM_EXPERTS)
        assert np.array_equal(experts_of(row["experts"]), signed)
        assert document.weights_TLK is not None and document.router is not None
        assert np.array_equal(np.array(row["weights"], np.float16), document.weights_TLK)
        assert np.array_equal(np.array(row["router_experts"]), document.router.experts_TLM)
        assert np.array_equal(
            np.array(row["router_logits"], np.float16), document.router.logits_TLM
        )
        for layer, hidden in document.hidden.items():
            assert np.array_equal(np.array(row[f"hidden_{layer}"], np.float16), hidden)


@pytest.mark.parametrize("tokens", [6, 1 << 16])
def test_a_parquet_file_holds_every_document(
    tokens: int, trace: TraceReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "ROW_TOKENS", tokens)
    out = tmp_path / "routes.parquet"
    export_trace(ExportSettings(trace=trace.directory, out=out))
    table = pq.read_table(out)
    check_documents(table.to_pylist(), trace)
    topology = json.loads(table.schema.metadata[TOPOLOGY_KEY])
    assert Topology.from_json(topology) == TOPOLOGY


def test_the_datasets_library_reads_both_kinds_of_export(
    trace: TraceReader, tmp_path: Path
) -> None:
    export_trace(ExportSettings(trace=trace.directory, out=tmp_path / "routes.parquet"))
    export_trace(ExportSettings(trace=trace.directory, out=tmp_path / "routes"))
    parquet = datasets.Dataset.from_parquet(
        str(tmp_path / "routes.parquet"), cache_dir=str(tmp_path / "cache")
    )
    for found in (parquet, datasets.load_from_disk(tmp_path / "routes"), to_dataset(trace)):
        check_documents(list(found), trace)


def test_rows_may_be_tokens(trace: TraceReader) -> None:
    rows = list(to_dataset(trace, rows="tokens"))
    assert len(rows) == trace.num_tokens
    assert [row["position"] for row in rows] == [*range(5), 0, *range(9)]
    assert [row["document"] for row in rows] == [0] * 5 + [1] + [2] * 9
    last = trace.document(2)
    assert rows[-1]["token_id"] == last.token_ids_T[-1] and rows[-1]["label"] == "kind 9"
    assert rows[-1]["experts"] == last.experts_TLK[-1].tolist()


def test_a_trace_without_token_ids_has_no_column_of_them(tmp_path: Path) -> None:
    with TraceWriter(
        tmp_path / "t", TOPOLOGY, provenance={}, extras=Extras(token_ids=False)
    ) as writer:
        document = random_document(np.random.default_rng(0), 4)
        writer.add({"decoder": document._replace(token_ids_T=np.zeros(4, np.int32))})
    dataset = to_dataset(TraceReader(tmp_path / "t"))
    assert dataset.column_names == ["document", "label", "phase", "experts"]


def test_an_export_neither_overwrites_nor_writes_nothing(
    trace: TraceReader, tmp_path: Path
) -> None:
    (tmp_path / "routes.parquet").write_text("mine")
    with pytest.raises(ValueError, match=r"routes\.parquet exists"):
        export_trace(ExportSettings(trace=trace.directory, out=tmp_path / "routes.parquet"))
    with TraceWriter(tmp_path / "empty", TOPOLOGY, provenance={}):
        pass
    with pytest.raises(ValueError, match="holds no documents"):
        export_trace(ExportSettings(trace=tmp_path / "empty", out=tmp_path / "out"))


@pytest.mark.parametrize("name", ["routes.csv", "routes.txt", "routes.pq"])
def test_a_file_of_another_kind_is_refused_and_no_folder_made_of_its_name(
    trace: TraceReader, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name}: no .* file is written; name a .parquet file"):
        export_trace(ExportSettings(trace=trace.directory, out=tmp_path / name))
    assert not (tmp_path / name).exists()
