"""Training of look-ahead networks on the text of traces, which the model runs again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from predictor.lookahead.networks import LookAheadNetworks
from predictor.lookahead.router_inputs import router_inputs
from predictor.lookahead.settings import LayerAheadSettings
from routing.shards import TraceReader

WARM_UP = 0.02
"""Share of the training in which the learning rate rises; afterwards it falls to zero."""


def train(
    model: Any, readers: list[TraceReader], settings: LayerAheadSettings
) -> LookAheadNetworks:
    """Train networks on the text of `readers`, on the device of `model`."""
    stack = readers[0].stack
    hidden = model.config.get_text_config().hidden_size
    networks = LookAheadNetworks(
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
    """The learning rate over its peak, after a share of the training."""
    return min(share / WARM_UP, (1 - share) / (1 - WARM_UP))


def _batches(
    readers: list[TraceReader], settings: LayerAheadSettings
) -> Iterator[list[np.ndarray]]:
    """All documents in random order, pass by pass, in batches of about `model_tokens`."""
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
