"""Settings of the commands that read foreign traces and write tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FormatName = Literal["vllm", "sglang", "megatron", "llama.cpp", "npy"]


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Read the routing trace of another program, and write it as a trace directory.

    Every command that reads traces then takes it: `expertflow compare`, `simulate`, `inspect`.
    Predictors need token ids; where a format has none, give --token-ids, or they refuse the trace.
    """

    files: list[Path]
    """Files in the foreign format: vllm, sglang .json, .jsonl, vllm also .npz; megatron .jsonl or
    the directory of a run; llama.cpp .csv; npy .npy or .npz."""
    format: FormatName
    """The program that wrote them."""
    model: str
    """The model that was traced: a directory, an id on the Hub, a JSON file with a routing topology
    (docs/formats.md), or a trace directory of the same model."""
    out: Path
    """Directory of the trace."""
    label: str | None = None
    """Label of all documents. Default: each file's name; a record's own `label` comes first."""
    layout: Literal["auto", "LNK", "NLK"] = "auto"
    """Order of the axes in npy arrays: layers, tokens, experts of a token. `auto` finds the layers
    by their number."""
    token_ids: Path | None = None
    """A .npy file of all token ids, in order, for formats that have none."""
    generated_only: bool = False
    """Leave the tokens of prompts out."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("name at least one file to import")

    def provenance(self) -> dict[str, Any]:
        """What decided the content of the trace."""
        return {
            "model": self.model,
            "format": self.format,
            "files": [str(path) for path in self.files],
            "label": self.label,
            "layout": self.layout,
            "token_ids": None if self.token_ids is None else str(self.token_ids),
            "generated_only": self.generated_only,
        }


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write a trace as a Parquet file, or as a data set of the `datasets` library."""

    trace: Path
    """Trace directory."""
    out: Path
    """A .parquet file, or the directory of a data set for `datasets.load_from_disk`."""
    rows: Literal["documents", "tokens"] = "documents"
    """One row for each document, or one for each token."""
    stack: str = "decoder"
    """Stack of an encoder-decoder model: `encoder` or `decoder`."""
