"""The reader of predictor files: opens an exported predictor and checks it before it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from routing.predictor_file.checksum import CHECKSUM_KEY, require_intact
from routing.predictor_file.format import (
    CACHED_INPUTS,
    HEADS,
    METADATA_KEY,
    OLDEST_HEADS,
    PADDING,
    PRESENT,
    SCHEMA,
    WINDOW_INPUTS,
)
from routing.topology import NO_EXPERT, Stack, Topology

if TYPE_CHECKING:
    import onnxruntime


class PredictorFile(NamedTuple):
    """An opened predictor."""

    session: onnxruntime.InferenceSession
    topology: Topology
    stack: Stack
    """The MoE layers that it predicts."""
    window: int
    """Newest tokens that a prediction depends on."""
    horizon: int
    """H, the tokens that the horizon head looks ahead."""
    cached: bool
    """True when single steps use a key/value cache; else each step runs the window again."""
    outputs: tuple[str, ...]
    """The heads that the file has: HEADS, or OLDEST_HEADS."""
    cache_shape: tuple[int, int, int]
    """(blocks, heads, head_dim) of the key/value cache; zeros without one."""


def open_predictor(path: str | Path, *, num_threads: int | None = None) -> PredictorFile:
    """Open and check `path`. Raises ValueError for a file that predictor.export did not write.

    num_threads: threads of onnxruntime; by default a quarter of the cores, at most 4.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no predictor at {path}")
    session = open_session(path, num_threads)
    entries = session.get_modelmeta().custom_metadata_map
    raw = entries.get(METADATA_KEY)
    if CHECKSUM_KEY in entries:
        require_intact(path, entries[CHECKSUM_KEY])
    if raw is None:
        raise ValueError(f"{path} is an ONNX file, but not one that predictor.export wrote")
    try:
        file = _describe(session, json.loads(raw))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} has damaged predictor metadata ({error!r})") from error
    _check_names(path, file)
    _check_answers(path, file)
    return file


def open_session(path: Path, num_threads: int | None = None) -> onnxruntime.InferenceSession:
    """Open an onnxruntime session on the CPU. Raises ValueError unless `path` is an ONNX file."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ValueError(
            "predictors need onnxruntime: install moe-expertflow[cpu] or moe-expertflow[gpu]"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or max(1, min(4, (os.cpu_count() or 1) // 4))
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a readable ONNX file ({reason:.200})") from error


def _describe(session: onnxruntime.InferenceSession, meta: dict[str, Any]) -> PredictorFile:
    if meta["schema"] != SCHEMA:
        raise ValueError(f"schema {meta['schema']}; this version reads schema {SCHEMA}")
    if min(int(meta["window"]), int(meta["horizon"])) < 1:
        raise ValueError(f"window {meta['window']} and horizon {meta['horizon']} are not positive")
    topology = Topology.from_json(meta["topology"])
    has_far = any(node.name == HEADS[-1] for node in session.get_outputs())
    return PredictorFile(
        session=session,
        topology=topology,
        stack=topology.stack(meta["stack"]),
        window=int(meta["window"]),
        horizon=int(meta["horizon"]),
        cached=bool(meta["cache"]),
        outputs=HEADS if has_far else OLDEST_HEADS,
        cache_shape=(int(meta["blocks"]), int(meta["heads"]), int(meta["head_dim"]))
        if meta["cache"]
        else (0, 0, 0),
    )


def _check_names(path: Path, file: PredictorFile) -> None:
    have = {node.name for node in (*file.session.get_inputs(), *file.session.get_outputs())}
    inputs = CACHED_INPUTS if file.cached else WINDOW_INPUTS
    want = {*inputs, *OLDEST_HEADS, *((PRESENT,) if file.cached else ())}
    if not want <= have:
        raise ValueError(f"{path} lacks the predictor inputs or outputs {sorted(want - have)}")


def _check_answers(path: Path, file: PredictorFile) -> None:
    """Raise ValueError unless the graph answers one token with finite logits of the right shape."""
    num_layers, num_experts = file.stack.num_layers, file.stack.num_experts
    tokens = 1 if file.cached else file.window
    feeds: dict[str, np.ndarray] = {
        "token_ids": np.zeros((1, tokens), np.int64),
        "positions": np.arange(tokens)[None],
    }
    if file.cached:
        blocks, heads, width = file.cache_shape
        feeds["routes"] = np.full((1, 1, num_layers, file.stack.top_k), NO_EXPERT, np.int64)
        feeds["past"] = np.zeros((blocks, 2, 1, heads, 1, width), np.float32)
        feeds["past_positions"] = np.full((1, 1), PADDING, np.int64)
    else:
        feeds["prompt_lengths"] = np.array([max(1, tokens // 2)])
    try:
        answers = file.session.run(list(file.outputs), feeds)
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot predict a token ({reason:.200})") from error
    for name, logits in zip(file.outputs, answers, strict=True):
        if logits.shape != (1, tokens, num_layers, num_experts):
            raise ValueError(
                f"{path} answers with {name} of shape {list(logits.shape)}, not "
                f"{[1, tokens, num_layers, num_experts]}"
            )
        if np.isnan(logits).any():
            raise ValueError(
                f"{path} predicts NaN: its training diverged or the file is damaged; train again"
            )
