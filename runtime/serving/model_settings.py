"""Settings of commands that serve a model: which one, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.serving.settings import ServeSettings
from runtime.sizing.cache_tokens import require_spill_tokens

if TYPE_CHECKING:
    from runtime.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class ModelSettings(ServeSettings):
    """How requests are served together, and by which model."""

    model: str
    """Model directory, or an id on the Hub."""
    predictor: Path | None = None
    """ONNX predictor of the model."""
    memory: str = "0.25"
    """Share of the experts that stays resident, or a size such as 2GiB for the whole model."""
    spill_tokens: int | None = None
    """On a GPU, room for so many tokens beyond `cache_tokens`, in pages of pinned host memory that
    attention reads over the link in every step; by default none.
    """
    dtype: str = "auto"
    """Number format of the model; `auto` is the one it is stored in."""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one."""
    shared: bool = False
    """Share one copy of a prepared model's experts in host memory with the other processes of this
    machine, as workers or replicas, one for each GPU.
    """
    record: Path | None = None
    """Directory to keep tokens and routes of everything in, as a trace to train the predictor
    further with (256 MiB at most). The text can be read back from it.
    """

    revision: str | None = None
    """Branch, tag or commit of an id on the Hub. HF_TOKEN opens private ones."""
    cache_dir: str | None = None
    """Folder to keep files fetched from the Hub in."""
    attn_implementation: str | None = None
    """Attention of transformers, such as sdpa or eager; by default its own choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_spill_tokens(self.spill_tokens, self.cache_tokens)

    def read_tokenizer(self) -> Any:
        """The model's tokenizer. Raises ValueError."""
        from routing.pretrained import read_tokenizer

        hub = {"revision": self.revision, "cache_dir": self.cache_dir}
        given = {name: value for name, value in hub.items() if value is not None}
        return read_tokenizer(self.model, **given)

    def load(self, tokenizer: Any = None) -> Engine:
        """The engine, with a key/value cache for these settings. Raises ValueError or OSError."""
        from runtime.loading import load, target_device
        from runtime.serving.scheduling.scheduler import num_rows

        on_gpu = target_device(self.device, self.model).type == "cuda"
        engine: Engine = load(
            self.model,
            self.predictor,
            memory=self.memory,
            device=self.device,
            dtype=self.dtype,
            tokenizer=tokenizer,
            host="shared" if self.shared else "file",
            record=self.record,
            revision=self.revision,
            cache_dir=self.cache_dir,
            attn_implementation=self.attn_implementation,
            context=self.context if on_gpu else None,
            batch=num_rows(self, self.scheduler) if on_gpu else None,
            cache_tokens=self.cache_tokens if on_gpu else None,
            spill_tokens=self.spill_tokens,
        ).expertflow
        return engine
