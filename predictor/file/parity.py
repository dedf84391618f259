"""Parity check: an exported graph against its torch model, before the file is kept."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from predictor.networks.interface import RoutePredictor
from predictor.networks.windows import Windows
from routing.predictor_file.driver import Heads, Past, run_step
from routing.predictor_file.format import HEADS
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.topology import NO_EXPERT

MAX_ERROR = 3e-4
"""Largest error of an exact file's logits: absolute up to 1, relative above."""
MIN_OVERLAP = 0.9
"""Smallest overlap of a quantised file's top-k with the exact model's. It is measured on random
tokens, which are harder than any text."""


def check_parity(predictor: RoutePredictor, path: Path, *, exact: bool) -> dict[str, float]:
    """Compare file and model on random inputs; returns the largest error and smallest overlap.

    An exact file must agree for any content of the key/value cache, a quantised one for the content
    that it wrote itself. Raises ValueError if they differ by more than MAX_ERROR or MIN_OVERLAP.
    """
    file, found = open_predictor(path, num_threads=1), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if exact or predictor.cache is None:
            found += [_compare(predictor, file, *sizes) for sizes in _sizes(predictor)]
        if predictor.cache is not None:
            found.append(_compare_steps(predictor, file))
    error = float(np.max([pair[0] for pair in found]))  # NaN where any is NaN
    overlap = float(np.min([pair[1] for pair in found]))
    if exact and not error <= MAX_ERROR:
        raise ValueError(f"the exported graph differs from torch by {error:.2e}; nothing written")
    if not exact and not overlap >= MIN_OVERLAP:
        raise ValueError(
            f"int8 keeps only {overlap:.3f} of the top-k (at least {MIN_OVERLAP} needed); "
            "export without --int8"
        )
    return {"max_error": error, "top_k_overlap": overlap}


def _sizes(predictor: RoutePredictor) -> list[tuple[int, int, int]]:
    """(batch, tokens, past): corner cases, and some random sizes."""
    window = predictor.shape.window
    corners = [(1, 1, 0), (1, 1, window), (1, 2 * window, 0), (3, 1, window)]
    random = torch.randint(1, window, (3, 3)).tolist()
    return corners + [(batch % 4 + 1, tokens, past) for batch, tokens, past in random]


@torch.no_grad()
def _compare(
    predictor: RoutePredictor, file: PredictorFile, batch: int, tokens: int, past: int
) -> tuple[float, float]:
    inputs = predictor.random_inputs(batch, tokens, past)
    expected = predictor.run_graph(*(inputs[name] for name in predictor.graph_inputs))
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    got = file.session.run(list(predictor.graph_outputs), feeds)
    valid_BT = inputs["positions"] >= 0
    return _distance(predictor, expected[: len(HEADS)], got[: len(HEADS)], valid_BT)


@torch.no_grad()
def _compare_steps(predictor: RoutePredictor, file: PredictorFile) -> tuple[float, float]:
    """A prompt in one run, then single steps through a ring buffer, against one pass of torch."""
    window, batch = predictor.shape.window, 2
    tokens = window + window // 2
    inputs = predictor.random_inputs(batch, tokens, 0)
    row = Windows(
        inputs["token_ids"],
        inputs["routes"],
        inputs["positions"],
        torch.full_like(inputs["routes"], NO_EXPERT),
        torch.ones(batch, dtype=torch.int64),
    )
    expected = predictor(row)
    past, outputs = Past(file, batch), list[Heads]()
    names = ("token_ids", "routes", "positions")
    for start, stop in pairwise([0, *range(window // 2, tokens + 1)]):
        given = (inputs[name][:, start:stop].numpy() for name in names)
        outputs.append(run_step(file, past, *given))
    joined = [np.concatenate(parts, 1) for parts in zip(*outputs, strict=True)]
    return _distance(predictor, expected, joined, row.valid_BT)


def _distance(
    predictor: RoutePredictor, expected: Any, got: list[np.ndarray], valid_BT: Tensor
) -> tuple[float, float]:
    """Largest error of the logits and smallest overlap of the top-k, over all heads."""
    top_k = predictor.shape.top_k
    errors, overlaps = [0.0], [1.0]
    for exact, exported in zip(expected, got, strict=True):
        left, right = exact[valid_BT], torch.from_numpy(exported)[valid_BT]
        if len(left) == 0:
            continue
        errors.append(float(((left - right).abs() / left.abs().clamp(min=1)).max()))
        best = left.topk(top_k).indices[..., :, None] == right.topk(top_k).indices[..., None, :]
        overlaps.append(float(best.any(-1).float().mean()))
    return float(np.max(errors)), float(np.min(overlaps))
