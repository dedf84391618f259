"""Opening an ONNX file in onnxruntime, as the predictor's own commands do."""

from pathlib import Path
from typing import Any


def open_session(path: Path) -> Any:
    """An onnxruntime session on one CPU thread. Raises ValueError for what is no ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise ValueError(f"{path} cannot be read as an ONNX file: {error}") from error
