"""Adapters beside a model's weights, which transformers puts on when it loads the directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_peft_available

from runtime.weights.repository.refusals import ADAPTER_CONFIG


def load_adapter_beside(model: Any) -> None:
    """Put on the adapter that lies beside the weights of a model loaded from a directory.

    As transformers does: only where PEFT is installed.
    Raises ValueError, and closes the engine, for an adapter of experts.
    """
    directory = Path(model.name_or_path)
    if not (directory / ADAPTER_CONFIG).is_file() or not is_peft_available():
        return
    try:
        model.load_adapter(str(directory))
    except ValueError as error:
        model.expertflow.close()
        raise ValueError(
            f"the adapter in {directory} cannot be put on an offloaded model: {error}. Merge it "
            f"into the weights (PEFT's merge_and_unload), or move {ADAPTER_CONFIG} away"
        ) from error
    except BaseException:
        model.expertflow.close()
        raise
