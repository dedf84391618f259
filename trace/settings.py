"""The settings of the trace stage; the docstring under each field is its command-line help."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """Run a mixture-of-experts model over data sets and record which experts every token used.

    The trace in --out is resumed when it is incomplete: run the same command again.
    """

    model: str
    """Hugging Face model: a directory or an id on the Hub."""
    dataset: list[str]
    """Data sets: names on the Hub (`name` or `name:config`), .txt, .jsonl and .parquet files, or
    folders of such files. Lines `<|endoftext|>` divide a .txt file into documents; without them it
    is one document."""
    out: str
    """Directory of the trace."""
    split: str = "train"
    """Split of the data sets from the Hub."""
    streaming: bool = False
    """Read data sets from the Hub while they download. Local files are always read this way."""
    column: str | None = None
    """Column with the text, or with the messages under --chat_template. Default: `text`, or
    `messages`."""
    label_column: str | None = None
    """Column with each document's label (its domain). Default: the name of the file or data set."""
    chat_template: bool = False
    """The column holds chats, lists of {role, content}: render them with the tokenizer's chat
    template."""
    max_documents: int | None = None
    """Stop after this many documents."""
    max_tokens: int = 2048
    """Cut documents (prompts, with --generate) to this many tokens, or to the model's context."""
    generate: int = 0
    """Generate up to this many tokens after every document and trace them too. Encoder-decoder
    models need it: their decoder reads what it has written."""
    sample: bool = False
    """Sample the generated tokens as the model's generation config says, instead of greedily."""
    seed: int = 0
    """Seed of --sample."""
    weights: bool = False
    """Record the router weights (float16) beside the expert ids."""
    lookahead: int = 0
    """Record too what the gates of the next 1 to this many MoE layers make of each layer's router
    input, for `runtime.simulate --all`. Costs 6 bytes an expert used and layer looked ahead."""
    batch_tokens: int = 8192
    """Tokens in a batch, padding included. Lower it when memory runs out."""
    shard_tokens: int = 1 << 18
    """Tokens in a shard: what a kill can lose of the work done."""
    device: str = "cpu"
    """Where the model runs: `cpu`, `cuda`, `cuda:1` ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model; `auto` is the one it is stored in."""
    workers: int = 0
    """Ray actors to spread the batches over, each with the model: on the cluster that RAY_ADDRESS
    names, else on this machine. The trace is the same. 0 runs them here. Needs the extra `ray`."""
    worker_cpus: int = 1
    """Cores of a worker."""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("--dataset names no data set")
        for name in ("max_tokens", "batch_tokens", "shard_tokens", "worker_cpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("generate", "lookahead", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, but is {getattr(self, name)}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"--max_documents must be at least 1, not {self.max_documents}")

    @property
    def text_column(self) -> str:
        return self.column or ("messages" if self.chat_template else "text")

    def provenance(self) -> dict[str, Any]:
        """What decides the contents of the trace; resuming requires the same."""
        free = {
            "out",
            "streaming",
            "batch_tokens",
            "shard_tokens",
            "device",
            "weights",
            "lookahead",
        }
        free |= {"workers", "worker_cpus"}
        return {key: value for key, value in asdict(self).items() if key not in free}


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Summarise a trace, and draw how its layers and domains use the experts."""

    directory: str
    """Directory of the trace."""
    verify: bool = False
    """Check every shard against its checksum."""
    picture: str | None = None
    """Where to write the picture. Default: usage.png in the directory, with one file per stack."""
