"""Train networks that look one to a few layers ahead, and add what they say to traces.

    python -m predictor.layer_ahead --model DIR_OR_ID --trace TRAINING_DIR \
        --annotate VALIDATION_DIR FIT_DIR --out DIR

A rival for `runtime.simulate --all`, not a predictor that the runtime loads: it reads the hidden
states of the running model. They are streamed from the model while it reads the tokens of the
training traces again, and never stored. Each trace to annotate is copied to `--out` under its own
name, with the look-ahead "mlp" in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routing.cli import run

if TYPE_CHECKING:
    import numpy as np

    from predictor.networks.layer_ahead import AheadNetworks
    from routing.shards import TraceReader

WARM_UP = 0.02
"""Share of the training during which the learning rate rises; then it falls to zero."""


@dataclass(frozen=True, kw_only=True)
class LayerAheadSettings:
    """Train small networks from each layer's router input to the experts of coming layers."""

    model: str
    """Hugging Face model of the traces: a directory or an id on the Hub."""
    trace: list[Path]
    """Trace directories with the text to train on."""
    annotate: list[Path]
    """Trace directories of other text, to be copied with what the networks say of it."""
    out: Path
    """Directory of the copies."""
    depth: int = 3
    """Look this many layers ahead."""
    width: int = 512
    """Width of a network between its two layers."""
    passes: int = 1
    """Passes over the training text."""
    batch_tokens: int = 512
    """Tokens of a training step."""
    model_tokens: int = 8192
    """Tokens that run through the model at once, padding not counted."""
    learning_rate: float = 6e-3
    """Highest learning rate of AdamW."""
    seed: int = 0
    """Seed of the weights and of the order of the text."""
    device: str = "cpu"
    """Where the model and the networks run."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "passes", "batch_tokens", "model_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not self.trace or not self.annotate:
            raise ValueError("--trace and --annotate each need a trace directory")
        seen = {path.resolve() for path in self.trace}
        for path in self.annotate:
            if path.resolve() in seen:
                raise ValueError(f"{path} is both trained on and annotated: name other text")


def main(settings: LayerAheadSettings) -> None:
    """Train and annotate. Raises ValueError, before any training, for what does not fit."""
    import torch

    from predictor.training.data import open_traces
    from predictor.training.router_inputs import load_model

    for path in settings.annotate:
        if (settings.out / path.name).exists():
            raise ValueError(f"{settings.out / path.name} exists already: name another --out")
    readers = open_traces([*settings.trace, *settings.annotate], "decoder")
    model = load_model(settings.model, readers[0].topology, device=settings.device)
    torch.manual_seed(settings.seed)
    networks = train(model, readers[: len(settings.trace)], settings)
    for reader in readers[len(settings.trace) :]:
        annotate(model, networks, reader, settings)


def train(model: Any, readers: list[TraceReader], settings: LayerAheadSettings) -> AheadNetworks:
    """Networks trained on the text of `readers`, on the device of `model`."""
    import torch
    from tqdm.auto import tqdm

    from predictor.networks.layer_ahead import AheadNetworks
    from predictor.training.router_inputs import router_inputs

    stack = readers[0].stack
    hidden = model.config.get_text_config().hidden_size
    networks = AheadNetworks(
        stack.num_layers, stack.num_experts, stack.top_k,
        hidden=hidden, width=settings.width, depth=settings.depth,
    ).to(model.device)  # fmt: skip
    optimizer = torch.optim.AdamW(
        networks.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    total, done = settings.passes * sum(reader.num_tokens for reader in readers), 0
    with tqdm(total=total, unit="tok", unit_scale=True, desc="training") as progress:
        for routed in router_inputs(model, _batches(readers, settings)):
            for rows in torch.randperm(routed.hidden_LNH.shape[1]).split(settings.batch_tokens):
                rate = settings.learning_rate * _schedule(done / total)
                optimizer.param_groups[0]["lr"] = rate
                loss = networks.loss(routed.hidden_LNH[:, rows], routed.experts_LNK[:, rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += len(rows)
                progress.update(len(rows))
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return networks


def _schedule(share: float) -> float:
    return min(share / WARM_UP, (1 - share) / (1 - WARM_UP))


def _batches(
    readers: list[TraceReader], settings: LayerAheadSettings
) -> Iterator[list[np.ndarray]]:
    """All documents in random order, pass by pass, in batches of about `model_tokens`."""
    import numpy as np

    generator = np.random.default_rng(settings.seed)
    places = [(reader, index) for reader in readers for index in range(len(reader))]
    for _ in range(settings.passes):
        batch: list[np.ndarray] = []
        for place in generator.permutation(len(places)):
            reader, index = places[place]
            batch.append(reader.document(index).token_ids_T)
            if sum(map(len, batch)) >= settings.model_tokens:
                yield batch
                batch = []
        if batch:
            yield batch


def annotate(
    model: Any, networks: AheadNetworks, reader: TraceReader, settings: LayerAheadSettings
) -> None:
    """Copy a trace with the look-ahead of `networks`, and print how good it is."""
    import numpy as np

    from predictor.training.router_inputs import router_inputs
    from routing.lookahead import MLP, recall_ahead
    from routing.shards import signed_experts
    from routing.writer import TraceWriter

    out = settings.out / reader.directory.name
    settled = {key: str(value) for key, value in asdict(settings).items()}
    writer = TraceWriter(
        out,
        reader.topology,
        provenance=reader.provenance | {"layer_ahead": settled},
        with_weights=reader.with_weights,
        lookahead=reader.lookahead | {MLP: settings.depth},
    )
    recalls, lengths = [], []
    with writer:
        batches = ([document.token_ids_T] for document in reader.documents())
        for document, routed in zip(reader.documents(), router_inputs(model, batches), strict=True):
            said = networks.named(routed.hidden_LNH)
            used_TLK = signed_experts(document.experts_TLK, reader.stack.num_experts)
            recalls.append(recall_ahead(said, used_TLK))
            lengths.append(len(document.token_ids_T))
            ahead = {**document.lookahead, MLP: said}
            writer.add({"decoder": document._replace(lookahead=ahead)})
    average = np.average(recalls, axis=0, weights=lengths)
    told = ", ".join(f"{value:.3f} at {d}" for d, value in enumerate(average, 1))
    print(f"{out}: recall by layers ahead {told} ({sum(lengths):,} tokens)")


if __name__ == "__main__":
    run(main, LayerAheadSettings, prog="python -m predictor.layer_ahead")
