"""trace.collect on quantised directories: decoded by transformers, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.quantised import LAYOUTS, LayoutWriter
from tests.helpers.tracing import assert_same_documents, trace, write_texts
from trace.collect import collect
from trace.settings import CollectSettings

Written = Callable[[str], tuple[Path, Path]]

REFUSED = {
    "nvfp4 modelopt": r"cannot undo the quantisation modelopt",
    "nvfp4 compressed-tensors": r"leaves out the global scales of nvfp4",
    "int4 gptq": r"cannot undo the quantisation gptq",
    "int4 awq": r"cannot undo the quantisation awq",
    "int4 compressed-tensors asymmetric": r"its weights cannot be \(",
    "fp8 24x24": r"its weights cannot be \(",
    "fp8 stacked": r"leaves out .*proj_scale_inv",
}
"""Layouts that transformers does not decode, and what is said of them."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A directory in a layout, and its twin that has the decoded weights."""
    write = LayoutWriter(tmp_path_factory.mktemp("quantised"))

    def needing(layout: str) -> tuple[Path, Path]:
        if LAYOUTS[layout].quantization["quant_method"] == "compressed-tensors":
            pytest.importorskip("compressed_tensors")
        return write(layout)

    return needing


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"{'word ' * (n % 5)}{n}" for n in range(8)]
    return write_texts(tmp_path_factory.mktemp("data") / "words.txt", texts)


@pytest.mark.parametrize(
    "layout", ["mxfp4 gpt-oss", "fp8 128x128", "int4 kimi", "int4 compressed-tensors 32"]
)
def test_the_trace_is_that_of_the_decoded_model(
    layout: str, written: Written, data: Path, tmp_path: Path
) -> None:
    coded, twin = written(layout)
    found = trace(coded, data, tmp_path / "coded", weights=True)
    assert_same_documents(found, trace(twin, data, tmp_path / "twin", weights=True))


def refusal(model: Path, data: Path, out: Path, **options: Any) -> str:
    settings = CollectSettings(model=str(model), dataset=[str(data)], out=str(out), **options)
    with pytest.raises(ValueError, match="record=DIR") as caught:
        collect(settings)
    assert str(model) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", REFUSED)
def test_a_quantisation_that_transformers_does_not_decode_is_refused_by_name(
    layout: str, written: Written, data: Path, tmp_path: Path
) -> None:
    message = refusal(written(layout)[0], data, tmp_path / "trace")
    assert re.search(REFUSED[layout], message), message


def test_workers_are_not_started_for_a_refused_quantisation(
    written: Written, data: Path, tmp_path: Path
) -> None:
    message = refusal(written("nvfp4 modelopt")[0], data, tmp_path / "trace", workers=1)
    assert "quantisation modelopt" in message


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_quantisation_that_only_its_own_file_describes_is_refused_by_name(
    name: str, written: Written, data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(written("nvfp4 modelopt")[0], model)
    config = json.loads((model / "config.json").read_text())
    (model / name).write_text(json.dumps({"quantization": config.pop("quantization_config")}))
    (model / "config.json").write_text(json.dumps(config))
    assert f"does not read {name}" in refusal(model, data, tmp_path / "trace")
