"""Traces whose routes follow known rules, and predictors trained on them, for the tests.

Of the three layers of `TOPOLOGY` the first routes by the token itself, the second by the token
before it, and the third by a secret of the document that shows in no token: only the routes taken
so far tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from predictor.networks.causal import CausalPredictor, CausalSettings
from predictor.networks.windows import Predictions, PredictorShape, Windows
from routing.predictor_file.format import PADDING
from routing.shards import GENERATED, PROMPT, Document, TraceReader
from routing.topology import NO_EXPERT, Layer, Stack, Topology
from routing.writer import TraceWriter

NUM_LAYERS, NUM_EXPERTS, TOP_K, VOCAB_SIZE = 3, 8, 2, 12

TOPOLOGY = Topology(
    model_type="rules",
    vocab_size=VOCAB_SIZE,
    stacks=(
        Stack(
            name="decoder",
            layers=tuple(Layer(f"layers.{i}", NUM_EXPERTS, TOP_K) for i in range(NUM_LAYERS)),
        ),
    ),
    model="0123456789abcdef",
)


def routes_by_rule(token_ids_T: np.ndarray, secret: int) -> np.ndarray:
    """uint8 [T, L, K]; the two experts of a layer are always 3 apart."""
    before_T = np.concatenate([[0], token_ids_T[:-1]])
    first_TL = np.stack([token_ids_T, before_T, np.full_like(token_ids_T, secret)], 1)
    return np.stack([first_TL % NUM_EXPERTS, (first_TL + 3) % NUM_EXPERTS], -1).astype(np.uint8)


def random_document(generator: np.random.Generator, length: int, prompt: int = 10**9) -> Document:
    token_ids_T = generator.integers(VOCAB_SIZE, size=length)
    phase_T = np.where(np.arange(length) < prompt, PROMPT, GENERATED).astype(np.uint8)
    secret = int(generator.integers(NUM_EXPERTS))
    return Document(
        token_ids_T.astype(np.int32), routes_by_rule(token_ids_T, secret), phase_T, "rules"
    )


def write_labelled(directory: Path, lengths: Sequence[int], prompt: int) -> TraceReader:
    """A trace of documents of these lengths, each after `prompt` tokens, under two labels in
    turn.
    """
    generator = np.random.default_rng(4)
    with TraceWriter(directory, TOPOLOGY, provenance={"model": "rules"}) as writer:
        for number, length in enumerate(lengths):
            document = random_document(generator, length, prompt)
            writer.add({"decoder": document._replace(label="even" if number % 2 else "odd")})
    return TraceReader(directory)


def write_trace(
    directory: Path, *, num_documents: int = 80, seed: int = 0, topology: Topology = TOPOLOGY
) -> Path:
    """A trace of documents of 1 to 79 tokens in several shards."""
    generator = np.random.default_rng(seed)
    with TraceWriter(directory, topology, provenance={"seed": seed}, shard_tokens=600) as writer:
        for _ in range(num_documents):
            writer.add({"decoder": random_document(generator, int(generator.integers(1, 80)))})
    return directory


def shape(*, window: int = 6, horizon: int = 3) -> PredictorShape:
    return PredictorShape.of(TOPOLOGY, "decoder", window=window, horizon=horizon)


def tiny_predictor(*, window: int = 6, blocks: int = 2) -> CausalPredictor:
    """An untrained predictor whose weights are large enough for every input to matter."""
    settings = CausalSettings(
        width=16, blocks=blocks, attention_heads=2, kv_heads=1, embedding_rank=8,
        stages=min(blocks, 2),
    )  # fmt: skip
    predictor = settings.build(shape(window=window))
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return predictor.eval()


@torch.no_grad()
def predict(predictor: CausalPredictor, batch: Windows) -> Predictions:
    return predictor(batch)


def assert_same(one: Predictions, other: Predictions) -> None:
    for a_BTLE, b_BTLE in zip(one, other, strict=True):
        torch.testing.assert_close(a_BTLE, b_BTLE, atol=1e-5, rtol=1e-5)


def random_windows(batch: int, tokens: int, *, first: int = 0) -> Windows:
    """Rows of one random document each, routes known, starting at position `first`."""
    size = (batch, tokens, NUM_LAYERS, TOP_K)
    return Windows(
        token_ids_BT=torch.randint(VOCAB_SIZE, (batch, tokens)),
        routes_BTLK=torch.randint(NUM_EXPERTS, size),
        positions_BT=torch.arange(first, first + tokens).repeat(batch, 1),
        experts_BTLK=torch.randint(NUM_EXPERTS, size),
        prompt_lengths_B=torch.ones(batch, dtype=torch.int64),
    )


def columns(windows: Windows, span: slice) -> Windows:
    """Some columns of every row."""
    return Windows(
        windows.token_ids_BT[:, span],
        windows.routes_BTLK[:, span],
        windows.positions_BT[:, span],
        windows.experts_BTLK[:, span],
        windows.prompt_lengths_B,
    )


def joined(*rows: Windows) -> Windows:
    """The rows side by side, with their positions."""
    return Windows(
        torch.cat([row.token_ids_BT for row in rows], 1),
        torch.cat([row.routes_BTLK for row in rows], 1),
        torch.cat([row.positions_BT for row in rows], 1),
        torch.cat([row.experts_BTLK for row in rows], 1),
        rows[0].prompt_lengths_B,
    )


def padding(batch: int, tokens: int) -> Windows:
    nothing = torch.full((batch, tokens, NUM_LAYERS, TOP_K), NO_EXPERT)
    return Windows(
        token_ids_BT=torch.zeros(batch, tokens, dtype=torch.int64),
        routes_BTLK=nothing,
        positions_BT=torch.full((batch, tokens), PADDING),
        experts_BTLK=nothing,
        prompt_lengths_B=torch.ones(batch, dtype=torch.int64),
    )


PREDICTOR = (
    "--model.predictor=predictor.networks.causal.CausalSettings",
    "--model.predictor.width=48",
    "--model.predictor.blocks=1",
    "--model.predictor.attention_heads=2",
    "--model.predictor.embedding_rank=12",
)


def train(trace: Path, out: Path, *options: str, config: Path | None = None) -> Path:
    """Train a small predictor with the command line; returns its final checkpoint.

    config: a configuration file that says which predictor, in place of PREDICTOR.
    """
    from predictor.train import main

    main(
        [
            "fit",
            f"--data.trace=[{trace}]",
            f"--trainer.default_root_dir={out}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.log_every_n_steps=5",
            "--model.learning_rate=0.01",
            *(PREDICTOR if config is None else (f"--config={config}",)),
            "--data.window=8",
            "--data.horizon=2",
            "--data.row_tokens=64",
            "--data.batch_size=4",
            "--data.val_fraction=0.15",
            "--data.test_fraction=0.15",
            *options,
        ]
    )
    return out / "predictor.ckpt"
