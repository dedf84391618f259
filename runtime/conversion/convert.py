"""A conversion from beginning to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from routing.layers import find_moe_layers
from runtime.conversion.activations import LayerInputs, record_inputs
from runtime.conversion.card import Conversion, write
from runtime.conversion.encoded_store import EncodedStore, Rounding
from runtime.conversion.quality import Quality, compare
from runtime.conversion.settings import CALIBRATED, ConversionSettings
from runtime.conversion.texts import Text, read_texts, sample_halves, windows
from runtime.loading import load, target_device
from runtime.weights.arena import expert_bytes
from runtime.weights.directory import load_tokenizer
from runtime.weights.encodings.encoders.table import find_encoder
from runtime.weights.encodings.table import to_json
from runtime.weights.prepared.writer import Preparation, preparation
from runtime.weights.repository.hub import HubOptions

SMALL = 1 << 30
"""Bytes of experts up to which the shipped texts are run without being asked for."""


class _Texts(NamedTuple):
    """Windows to calibrate and to measure on, and what they are called."""

    calibration: list[Tensor]
    measured: list[Tensor]
    calibration_names: list[str]
    measured_names: list[str]


def convert(
    model: str | Path, out: str | Path, settings: ConversionSettings, hub: HubOptions
) -> Conversion:
    """Write a lossy prepared copy of `model` to `out`, with a report of its loss.

    Raises ValueError as `preparation` does, and for an encoding that cannot take the experts. What
    goes wrong leaves no `out`.
    """
    assert settings.encoding is not None, "a conversion has an encoding"
    encoder = find_encoder(settings.encoding, settings.group)
    device = target_device(settings.device, str(model))
    with preparation(model, out, hub) as started:
        _require_plain(started)
        rounding = Rounding(encoder, settings.rounding, device)
        EncodedStore(started.store, started.layers, rounding, [])  # shapes, before anything runs
        texts = _choose_texts(started, settings)
        inputs = _record(started, texts.calibration, rounding)
        experts = EncodedStore(started.store, started.layers, rounding, inputs)
        started.write(experts, is_lossy=True)
        quality = _measure(started, texts.measured, device)
        report = _report(str(model), experts, texts, rounding, inputs, quality)
        write(report, started.out)
    return report


def _require_plain(started: Preparation) -> None:
    for index, layer in enumerate(started.layers):
        for name, matrix in started.store.coding(index).items():
            raise ValueError(
                f"{started.directory}: {layer.name}.{name} is in {matrix.encoding.name} already; "
                "--encoding takes a checkpoint of plain weights (without it, the codes are kept)"
            )


def _choose_texts(started: Preparation, settings: ConversionSettings) -> _Texts:
    """The given texts; for a small model those that are shipped, where there are none."""
    given = read_texts(settings.calibration), read_texts(settings.text)
    experts = zip(started.layers, map(started.store.specs, range(len(started.layers))), strict=True)
    total_bytes = sum(layer.num_experts * expert_bytes(specs) for layer, specs in experts)
    shipped = sample_halves() if total_bytes <= SMALL else ([], [])
    calibration, measured = (one or other for one, other in zip(given, shipped, strict=True))
    if settings.rounding not in CALIBRATED:
        calibration = []
    tokenizer = load_tokenizer(started.directory)
    if tokenizer is None:
        if any(given):
            raise ValueError(f"{started.directory} has no tokenizer for --text and --calibration")
        calibration, measured = [], []

    def cut(texts: list[Text]) -> list[Tensor]:
        return windows(texts, tokenizer, settings.tokens) if texts else []

    names = [[text.name for text in texts] for texts in (calibration, measured)]
    return _Texts(cut(calibration), cut(measured), *names)


def _record(started: Preparation, texts: list[Tensor], rounding: Rounding) -> list[LayerInputs]:
    if not texts:
        return []
    with _running(started.directory, started, rounding.device) as model:
        return record_inputs(model, find_moe_layers(model), texts, rounding.device)


def _measure(started: Preparation, texts: list[Tensor], device: torch.device) -> Quality | None:
    if not texts:
        return None
    with (
        _running(started.directory, started, device) as original,
        _running(started.out, started, device) as converted,
    ):
        return compare(original, [converted], texts)[0]


@contextmanager
def _running(directory: Path, started: Preparation, device: torch.device) -> Iterator[Any]:
    """The model of a directory with about one layer's experts in slots."""
    model = load(directory, memory=1 / len(started.layers), device=device)
    try:
        yield model
    finally:
        model.expertflow.close()


def _report(
    name: str,
    experts: EncodedStore,
    texts: _Texts,
    rounding: Rounding,
    inputs: list[LayerInputs],
    quality: Quality | None,
) -> Conversion:
    codings = [experts.coding(layer) for layer in range(experts.num_layers)]
    details: list[dict[str, Any]] = []
    for coding in codings:
        for matrix in coding.values():
            if (one := to_json(matrix.encoding)) not in details:
                details.append(one)
    used = rounding.name if inputs or rounding.name not in CALIBRATED else "search"
    return Conversion(
        original=name,
        encoding=details[0]["name"],
        details=details,
        rounding=used,
        bits=experts.bits,
        calibration=texts.calibration_names if inputs else [],
        calibration_tokens=len(inputs[0].hidden_TH) if inputs else 0,
        text=texts.measured_names,
        quality=quality,
    )
