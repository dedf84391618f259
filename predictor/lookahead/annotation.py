"""Copies of traces with a look-ahead in them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from predictor.lookahead.networks import LookAheadNetworks
from predictor.lookahead.router_inputs import router_inputs
from predictor.lookahead.settings import LayerAheadSettings
from routing.lookahead import LINEAR, MLP, recall_ahead
from routing.shards import TraceReader, signed_experts
from routing.writer import TraceWriter


def annotate(
    model: Any, networks: LookAheadNetworks, reader: TraceReader, settings: LayerAheadSettings
) -> None:
    """Copy a trace with the look-ahead of `networks`, and print its recall by distance."""
    out, name = settings.out / reader.directory.name, MLP if settings.width else LINEAR
    options = {key: str(value) for key, value in asdict(settings).items()}
    reader.require_token_ids("running the model again")
    writer = TraceWriter(
        out,
        reader.topology,
        provenance=reader.provenance | {"layer_ahead": options},
        with_weights=reader.with_weights,
        lookahead=reader.lookahead | {name: settings.depth},
        extras=reader.extras,
    )
    if writer.num_documents:
        raise ValueError(f"{out} already holds documents: name another --out, or delete it")
    recalls, lengths = [], []
    with writer:
        batches = ([document.token_ids_T] for document in reader.documents())
        for document, routed in zip(reader.documents(), router_inputs(model, batches), strict=True):
            predicted = networks.predict(routed.hidden_LNH)
            used_TLK = signed_experts(document.experts_TLK, reader.stack.num_experts)
            recalls.append(recall_ahead(predicted, used_TLK))
            lengths.append(len(document.token_ids_T))
            lookahead = {**document.lookahead, name: predicted}
            writer.add({"decoder": document._replace(lookahead=lookahead)})
    average = np.average(recalls, axis=0, weights=lengths)
    by_distance = ", ".join(f"{value:.3f} at {d}" for d, value in enumerate(average, 1))
    print(f"{out}: recall by layers ahead {by_distance} ({sum(lengths):,} tokens)")
