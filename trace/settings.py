"""Settings of the trace stage. The docstring under a field is its command-line help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SPLIT = "train"


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """Run a mixture-of-experts model over data sets and record the experts of every token.

    An incomplete trace in --out is resumed: run the same command again.
    """

    model: str
    """Hugging Face model: a directory or an id on the Hub. A quantised one is decoded as it is
    loaded, if transformers can (mxfp4, fp8, most of compressed-tensors); `runtime.load(...,
    record=DIR)` records a trace of any other, or of one too large for memory."""
    dataset: list[str]
    """Data sets: names on the Hub (`name` or `name:config`), files (.txt, .md, .jsonl, .json, .csv,
    .tsv, .parquet, .arrow; text also as .gz, .bz2 or .xz), folders of such files, and folders that
    the `datasets` library wrote or that lie as on the Hub. A line `<|endoftext|>` in a .txt file
    ends a document; without one, the file is one document."""
    out: str
    """Directory of the trace."""
    split: str = SPLIT
    """Split of the data sets from the Hub, or of folders that are laid out like them."""
    streaming: bool = False
    """Read data sets of the Hub while they download. Local files are always streamed."""
    column: str | None = None
    """Column with the text or the turns. Default: `text`, or else a known form of chat (messages,
    conversations, prompt and completion, instruction and output, question and answer ...)."""
    label_column: str | None = None
    """Column with each document's label (its domain). Default: the name of the file or data set."""
    chat_template: bool | str = False
    """Render chats: `true` with the tokenizer's chat template, FILE with the Jinja template in it,
    `plain` by joining the turns. Without it, chats are refused."""
    max_documents: int | None = None
    """Stop after this many documents."""
    max_tokens: int = 2048
    """Cut documents (prompts, with --generate) to this many tokens, or to the model's context."""
    generate: int = 0
    """Generate up to this many tokens after every document, and trace them too. Encoder-decoder
    models need it: their decoder reads only what it has generated."""
    sample: bool = False
    """Sample the generated tokens by the model's generation config. Default: greedy decoding."""
    seed: int = 0
    """Seed of --sample."""
    weights: bool = False
    """Record the router weights (float16) beside the expert ids."""
    lookahead: int = 0
    """Record the rankings of the gates of the next MoE layers, this many, on each layer's router
    input too, for `runtime.simulate --all`. Costs 6 bytes for each used expert and layer ahead."""
    router_logits: int = 0
    """Record the highest router logits of every layer too, this many (float16, with their experts).
    Costs 3 bytes for each and layer, 4 above 256 experts."""
    hidden: list[int] = field(default_factory=list)
    """Record the router inputs of these MoE layers too, counted from 0 (float16): the hidden states
    that a predictor of later layers would read. Costs 2 bytes for each of the hidden size."""
    batch_tokens: int = 8192
    """Tokens in a batch, padding included. Lower it if memory runs out."""
    shard_tokens: int = 1 << 18
    """Tokens in a shard: the most work that a killed run loses."""
    device: str = "cpu"
    """Device of the model: `cpu`, `cuda`, `cuda:1` ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model; `auto` is the format of its checkpoint."""
    workers: int = 0
    """Ray actors that share the batches, each with a copy of the model: on the cluster at
    RAY_ADDRESS, or else on this machine. The trace is the same. 0: no actors. Needs the extra
    `ray`."""
    worker_cpus: int = 1
    """Cores of a worker."""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("--dataset names no data set")
        for name in ("max_tokens", "batch_tokens", "shard_tokens", "worker_cpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("generate", "lookahead", "router_logits", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, but is {getattr(self, name)}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"--max_documents must be at least 1, not {self.max_documents}")

    def provenance(self) -> dict[str, Any]:
        """The settings that decide the contents of a trace. Resuming it needs the same."""
        free = {
            "out",
            "streaming",
            "batch_tokens",
            "shard_tokens",
            "device",
            "weights",
            "lookahead",
            "router_logits",
            "hidden",
        }
        free |= {"workers", "worker_cpus"}
        return {key: value for key, value in asdict(self).items() if key not in free}


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Summarise a trace, and draw the expert usage of its layers and domains."""

    directory: str
    """Directory of the trace."""
    verify: bool = True
    """Check the checksum and the values of every shard. `--verify false` spares reading them."""
    picture: str | None = None
    """File of the picture. Default: usage.png in the directory; one file for each stack."""
