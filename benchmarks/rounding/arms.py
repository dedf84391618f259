"""One arm a model: the original, and each conversion of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounding.settings import EncodingsSettings
from routing.layers import find_moe_layers
from runtime.conversion.activations import LayerInputs, record_inputs
from runtime.conversion.encoded_store import EncodedStore, Rounding
from runtime.conversion.quality import Quality, compare
from runtime.conversion.texts import read_texts, windows
from runtime.loading import load
from runtime.weights.directory import load_tokenizer
from runtime.weights.encodings.encoders.table import find_encoder
from runtime.weights.prepared.writer import preparation
from runtime.weights.repository.hub import HubOptions

ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A conversion and what it cost."""

    encoding: str
    rounding: str
    bits: float
    """Of a weight, scales included."""
    seconds: float
    """Time of rounding all experts."""
    directory: Path
    quality: Quality | None = None

    @property
    def name(self) -> str:
        return f"{self.encoding} {self.rounding}"


def convert_all(settings: EncodingsSettings, folder: Path) -> Iterator[Arm]:
    """Convert the model under every encoding and rounding, each into a directory of `folder`."""
    inputs = _record(settings)
    device = torch.device(settings.device)
    for encoding in settings.encodings:
        for name in settings.roundings:
            out = folder / f"{encoding}-{name}"
            rounding = Rounding(find_encoder(encoding), name, device)
            started = time.perf_counter()
            with preparation(settings.model, out, HubOptions()) as prepared:
                experts = EncodedStore(prepared.store, prepared.layers, rounding, inputs)
                prepared.write(experts, is_lossy=True)
            yield Arm(
                encoding=experts.coding(0)["down_proj"].encoding.name,
                rounding=name,
                bits=experts.bits,
                seconds=time.perf_counter() - started,
                directory=out,
            )


def measure(settings: EncodingsSettings, arms: list[Arm], folder: Path) -> list[Quality]:
    """Run all arms over the text, side by side. Routes go to `folder`, by the arm's name."""
    texts = _windows(settings, settings.text, settings.tokens)
    with ExitStack() as stack:
        original = stack.enter_context(_loaded(settings, settings.model, folder / ORIGINAL))
        converted = [
            stack.enter_context(_loaded(settings, arm.directory, folder / arm.name)) for arm in arms
        ]
        return compare(original, converted, texts)


def _record(settings: EncodingsSettings) -> list[LayerInputs]:
    texts = _windows(settings, settings.calibration, settings.calibration_tokens)
    with _loaded(settings, settings.model, None) as model:
        return record_inputs(model, find_moe_layers(model), texts, torch.device(settings.device))


def _windows(settings: EncodingsSettings, paths: list[Path], tokens: int) -> list[torch.Tensor]:
    return windows(read_texts(paths), load_tokenizer(settings.model), tokens)


@contextmanager
def _loaded(settings: EncodingsSettings, directory: Path, record: Path | None) -> Iterator[Any]:
    """The model of a directory, all experts resident."""
    model = load(directory, memory=1.0, device=settings.device, record=record)
    try:
        yield model
    finally:
        model.expertflow.close()
