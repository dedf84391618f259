"""The kinds of artefact that the project reads: traces, checkpoints, predictors, models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import runtime
from predictor.training.checkpoint import load_checkpoint
from routing.inspect_model import topology_of
from routing.predictor_file.reader import open_predictor
from routing.shards import TraceReader
from runtime.prepare import prepare
from runtime.weights.prepared.checksums import verify
from tests.fuzz.artefacts import Artefact
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import train
from tests.helpers.predicting import write_trace as write_rules
from tests.helpers.quantised import write_quantised
from tests.helpers.tiny import save_tiny, tiny_model
from tests.helpers.tracing import TEXTS, write_texts
from trace.collect import collect
from trace.settings import CollectSettings

IDS_1T = torch.tensor([[7, 8, 9, 10]])


def _write_trace(folder: Path) -> None:
    model = save_tiny(folder.parent / "traced", "olmoe")
    texts = write_texts(folder.parent / "letters.txt", TEXTS)
    collect(
        CollectSettings(
            model=str(model), dataset=[str(texts)], out=str(folder), batch_tokens=512,
            shard_tokens=200,
        )
    )  # fmt: skip


def _read_trace(folder: Path) -> Any:
    reader = TraceReader(folder, verify=True)
    arrays = ("token_ids_T", "experts_TLK", "phase_T", "weights_TLK")
    return [
        (document.label, *(np.asarray(getattr(document, name)).tobytes() for name in arrays))
        for document in reader.documents()
    ]


def _write_file(folder: Path) -> None:
    write_predictor(folder / "predictor.onnx", topology_of(tiny_model("olmoe")))


def _read_file(folder: Path) -> Any:
    """A few tokens that are generated with it, and its predictions' use."""
    file = open_predictor(folder / "predictor.onnx")
    loaded = runtime.load(tiny_model("olmoe"), folder / "predictor.onnx", memory=0.25)
    with loaded.expertflow as engine:
        tokens = loaded.generate(IDS_1T, max_new_tokens=3, do_sample=False).tolist()
        return tokens, engine.stats().prefetches, file.window, file.horizon, file.outputs


def _write_checkpoint(folder: Path) -> None:
    traced = write_rules(folder.parent / "rules", num_documents=40)
    written = train(traced, folder.parent / "run", "--trainer.max_steps=1")
    shutil.copyfile(written, folder / "predictor.ckpt")


def _read_checkpoint(folder: Path) -> Any:
    """Weights, in bits, and all that is told of them."""
    trained = load_checkpoint(folder / "predictor.ckpt")
    weights = [weight.numpy().tobytes() for weight in trained.predictor.state_dict().values()]
    told = (trained.topology, trained.stack, trained.settings, repr(trained.metrics))
    return weights, told, trained.provenance


def _write_model(folder: Path) -> None:
    save_tiny(folder, "olmoe", num_hidden_layers=2)


def _write_quantised(folder: Path) -> None:
    plain = save_tiny(folder.parent / "to-quantise", "olmoe", num_hidden_layers=2)
    write_quantised(plain, folder, "fp8 one scale")


def _write_prepared(folder: Path) -> None:
    model = save_tiny(folder.parent / "to-prepare", "olmoe", num_hidden_layers=2)
    folder.rmdir()
    prepare(model, folder)


def _write_packed(folder: Path) -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2).bfloat16()
    plain = folder.parent / "to-pack"
    model.save_pretrained(plain)
    folder.rmdir()
    prepare(plain, folder, packed=True)


def _read_prepared(folder: Path) -> Any:
    verify(folder)
    return _read_model(folder)


def _read_model(folder: Path) -> Any:
    """Logits, in bits."""
    loaded = runtime.load(folder, memory=0.25)
    with torch.inference_mode():
        logits = loaded(IDS_1T).logits
    loaded.expertflow.close()
    return logits.view(torch.uint8).numpy().tobytes()


ARTEFACTS = (
    Artefact("trace", _write_trace, _read_trace, checked=True),
    Artefact("predictor", _write_file, _read_file, checked=True),
    Artefact("checkpoint", _write_checkpoint, _read_checkpoint, checked=True),
    Artefact("model", _write_model, _read_model, checked=False),
    Artefact("quantised", _write_quantised, _read_model, checked=False),
    Artefact("prepared", _write_prepared, _read_prepared, checked=True),
    Artefact("packed", _write_packed, _read_prepared, checked=True),
)
