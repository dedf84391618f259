"""The traced model's tokenizer and sizes, from its own files where they lie on this machine.

Nothing is fetched. Where the traced model is not here, the page says what it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from routing.shards import TraceReader
from runtime.replay.settings import ReplaySettings


class ModelFiles(NamedTuple):
    """The traced model's tokenizer and sizes."""

    tokenizer: Any
    """None where the text cannot be had."""
    expert_bytes: float | None
    """Mean over all experts, as they are stored and moved."""
    remark: str
    """What is missing and why; "" if nothing is."""


def find_model_files(reader: TraceReader, settings: ReplaySettings) -> ModelFiles:
    """The files of `--model`, or of the model that was traced.

    Raises ValueError where `--model` cannot be read or is of another model.
    """
    given_bytes = None if settings.expert_mb is None else settings.expert_mb * 1e6
    if settings.model is not None:
        reader.require_token_ids("the text of --model")
        tokenizer = _tokenizer(reader, settings.model)
        return ModelFiles(tokenizer, given_bytes or _expert_bytes(reader, settings.model), "")
    traced = str(reader.provenance.get("model") or "")
    if not reader.extras.token_ids:
        return ModelFiles(None, given_bytes, "The trace has no token ids: the tokens are numbered.")
    if not traced:
        return ModelFiles(
            None, given_bytes, "The trace names no model: --model DIR gives the text."
        )
    try:
        tokenizer = _tokenizer(reader, traced)
    except ValueError as error:
        return ModelFiles(None, given_bytes, f"No text of the tokens: {error}.")
    if given_bytes is None and Path(traced).is_dir():
        given_bytes = _expert_bytes(reader, traced)
    return ModelFiles(tokenizer, given_bytes, "")


def _tokenizer(reader: TraceReader, model: str | Path) -> Any:
    """The tokenizer of the trace. Raises ValueError for one of another vocabulary."""
    from routing.inspect_model import tokenizer_fingerprint
    from routing.pretrained import read_tokenizer

    tokenizer = read_tokenizer(model, local_files_only=True)
    recorded = reader.topology.tokenizer
    if recorded is not None and tokenizer_fingerprint(tokenizer) != recorded:
        raise ValueError(f"the tokenizer in {model} is another than the trace was made with")
    return tokenizer


def _expert_bytes(reader: TraceReader, model: str | Path) -> float:
    """Mean bytes of an expert. Raises ValueError where the model is not that of the trace."""
    from routing.inspect_model import topology_of
    from runtime.weights.repository.hub import HubOptions
    from runtime.weights.source import from_path_on_meta

    source = from_path_on_meta(model, "auto", HubOptions())
    reader.topology.require_match(
        topology_of(source.model), ours=f"the trace {reader.directory}", theirs=f"the model {model}"
    )
    return source.mean_stored_bytes


def texts_of(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the whole text.

    A character of several tokens is all in the last of them.
    """
    from runtime.serving.detokenizer import TextStream

    stream = TextStream(tokenizer, shows_special=True)
    texts = [stream.push(int(token)) for token in token_ids]
    if texts:
        texts[-1] += stream.finish()
    return texts
