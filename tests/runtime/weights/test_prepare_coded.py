"""runtime.prepare of a checkpoint whose experts are in codes: the codes are kept as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import runtime
from runtime.prepare import prepare
from runtime.weights.prepared.checksums import verify
from runtime.weights.prepared.manifest import read_manifest
from runtime.weights.source import Source, from_path
from tests.helpers.quantised.checkpoint import save_source, write_quantised
from tests.helpers.quantised.layouts import LAYOUTS

CHOSEN = ["mxfp4 gpt-oss", "fp8 128x128"]


@pytest.fixture(scope="module", params=CHOSEN)
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coded")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    save_source(root / "plain", LAYOUTS[request.param].architecture, sizes)
    return write_quantised(root / "plain", root / "coded", request.param, twin=root / "twin")


@pytest.fixture
def sources(coded: Path, tmp_path: Path) -> tuple[Source, Source]:
    prepared = prepare(coded, tmp_path / "prepared")
    return from_path(prepared, None, "auto"), from_path(coded, None, "auto")


def test_a_prepared_copy_stores_the_codes_of_the_checkpoint(sources: tuple[Source, Source]) -> None:
    ours, theirs = sources
    assert ours.encoding == theirs.encoding is not None
    for layer in range(len(ours.layers)):
        assert ours.store.coding(layer) == theirs.store.coding(layer)
        specs = ours.store.stored_specs(layer)
        assert specs == theirs.store.stored_specs(layer)
        one, other = (
            {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
            for _ in range(2)
        )
        ours.store.read_stored(layer, 3, one)
        theirs.store.read_stored(layer, 3, other)
        for name in specs:
            assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))


def test_an_exact_copy_never_calls_itself_lossy(coded: Path, tmp_path: Path) -> None:
    prepared = prepare(coded, tmp_path / "prepared")
    assert not read_manifest(prepared).is_lossy and not (prepared / "conversion.json").exists()
    engine = runtime.load(prepared).expertflow
    assert engine.encoding == runtime.load(coded).expertflow.encoding
    assert "lossy" not in engine.report() and engine.stats().loss is None
    assert verify(prepared) == sum(len(layer.checksums) for layer in read_manifest(prepared).layers)


def test_codes_are_not_rounded_a_second_time(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is in (mxfp4|fp8-block) already; --encoding takes"):
        prepare(coded, tmp_path / "out", encoding="int4")
    assert not (tmp_path / "out").exists()
