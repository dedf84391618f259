"""Export a trained predictor to ONNX: `python -m predictor.export CKPT OUT.onnx [--int8 true]`.

The file appears only after onnxruntime has agreed with torch: on random inputs of several sizes
and, for a graph with a key/value cache, on steps through a ring buffer compared with one pass.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from routing.cli import run
from routing.process.output_lock import OutputLock


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Export a checkpoint of predictor.train to ONNX, checked against torch before it is kept."""

    checkpoint: Path
    """Checkpoint of predictor.train (predictor.ckpt)."""
    out: Path
    """ONNX file to write; an existing one is replaced."""
    int8: bool = False
    """Store the weights in int8: a smaller and faster file."""
    json: Path | None = None
    """Write the file's size and its agreement with torch to this JSON file."""


def export(settings: ExportSettings) -> None:
    """Write `settings.out`, or raise ValueError and leave it as it was."""
    from predictor.file.exporter import write_graph, write_quantized
    from predictor.file.parity import check_parity
    from predictor.training.checkpoint import load_checkpoint

    trained = load_checkpoint(settings.checkpoint)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        OutputLock(settings.out),
        tempfile.TemporaryDirectory(dir=settings.out.parent, prefix=".export-") as scratch,
    ):
        exact = Path(scratch) / "exact.onnx"
        write_graph(trained, exact)
        result = exact
        if settings.int8:
            result = Path(scratch) / "int8.onnx"
            write_quantized(exact, result)
        parity = check_parity(trained.predictor, result, exact=not settings.int8)
        os.replace(result, settings.out)
    size = round(settings.out.stat().st_size / 2**20, 2)
    print(
        f"wrote {settings.out}, {size} MiB\n"
        f"checked against torch: logits differ by at most {parity['max_error']:.1e}, "
        f"{parity['top_k_overlap']:.1%} of the top K are the same"
    )
    if settings.json is not None:
        report = {"file": str(settings.out), "MiB": size, **parity}
        settings.json.write_text(json.dumps(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(
        export,
        ExportSettings,
        prog="python -m predictor.export",
        positional=["checkpoint", "out"],
        examples=[
            "runs/predictor/predictor.ckpt predictor.onnx",
            "runs/predictor/predictor.ckpt predictor.onnx --int8",
        ],
    )
