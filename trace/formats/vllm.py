"""vLLM's `routed_experts`: requests with the experts of every token, as JSON, JSON lines or npz.

Read from vllm-project/vllm: docs/features/routed_experts.md at e205901 (PR #28284 brought the
feature, #51906 the prompt offset) and the RequestOutput of May 2026.

A record is a `RequestOutput` with `outputs`, an answer of the OpenAI API with `choices`, or both in
one flat object (the keys of an .npz of one request):

    prompt_token_ids                                     [P]           ids, with return_token_ids
    prompt_routed_experts                                [P, F, K]     newer versions
    outputs or choices: token_ids                        [G]
                        routed_experts                   [G - 1, F, K] beside prompt_routed_experts
                                                         [P + G - 1, F, K] alone
    routed_experts_prompt_start                          rows of the prompt left out before it

The last token sampled was never run and has no row; files that hold one row a generated token,
[G, F, K], are read too. F counts all layers of the model, or its MoE layers alone. Arrays are
lists, base64 of a .npy file, or an object with base64 `data`, `shape` and `dtype`. Without token
ids (`return_token_ids` not asked for) the trace has none, so predictors refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from routing.topology import Stack
from trace.formats.arrays import count, load_numpy, records, routed_array, token_list
from trace.formats.document import ForeignDocument, layer_columns
from trace.formats.settings import ImportSettings

ROUTES, PROMPT_ROUTES = "routed_experts", "prompt_routed_experts"
IDS, PROMPT_IDS = "token_ids", "prompt_token_ids"
START = "routed_experts_prompt_start"


def read(path: Path, stack: Stack, options: ImportSettings) -> Iterator[ForeignDocument]:
    """The documents of a file, one for each completion. Raises ValueError."""
    for record, where in _npz(path) if path.suffix == ".npz" else records(path):
        completions = record.get("outputs") or record.get("choices") or [record]
        if not isinstance(completions, list):
            raise ValueError(f"{where}: its outputs are no list")
        for index, completion in enumerate(completions):
            place = where if len(completions) == 1 else f"{where}, completion {index}"
            if not isinstance(completion, dict):
                raise ValueError(f"{place}: no object, but {completion!r:.60}")
            yield _document(record, completion, stack, place)


def _npz(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    yield dict(load_numpy(path, str(path))), str(path)


def _document(
    record: dict[str, Any], completion: dict[str, Any], stack: Stack, where: str
) -> ForeignDocument:
    prompt_ids, ids = _ids(record, completion, PROMPT_IDS, where), None
    if completion.get(IDS) is not None:
        ids = token_list(completion[IDS], where)
    rows_TFK, num_prompt = _rows(record, completion, prompt_ids, ids, where)
    columns = layer_columns(range(rows_TFK.shape[1]), stack, where)
    start = count(record.get(START) or completion.get(START) or 0, START, where)
    known = None
    if prompt_ids is not None and ids is not None:
        known = np.array([*prompt_ids, *ids][start:], np.int64)
        if len(known) - len(rows_TFK) not in (0, 1):
            raise ValueError(
                f"{where}: the routes of {len(rows_TFK)} tokens, but {len(prompt_ids)} ids of the "
                f"prompt (from {start} on) and {len(ids)} generated"
            )
        known, num_prompt = known[: len(rows_TFK)], max(len(prompt_ids) - start, 0)
    label = record.get("label")
    return ForeignDocument(
        rows_TFK[:, columns],
        known,
        min(num_prompt, len(rows_TFK)),
        where,
        None if label is None else str(label),
    )


def _ids(
    record: dict[str, Any], completion: dict[str, Any], key: str, where: str
) -> list[int] | None:
    value = completion[key] if completion.get(key) is not None else record.get(key)
    return None if value is None else token_list(value, where)


def _rows(
    record: dict[str, Any],
    completion: dict[str, Any],
    prompt_ids: list[int] | None,
    ids: list[int] | None,
    where: str,
) -> tuple[np.ndarray, int]:
    """The routes of prompt and answer, and how many rows are the prompt's as far as is known."""
    if completion.get(ROUTES) is None and record.get(PROMPT_ROUTES) is None:
        raise ValueError(
            f"{where}: it has no {ROUTES}: start vLLM with --enable-return-routed-experts"
        )
    parts = [
        routed_array(part, where)
        for part in (record.get(PROMPT_ROUTES), completion.get(ROUTES))
        if part is not None
    ]
    parts = [part for part in parts if len(part)] or parts[:1]
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"{where}: prompt and answer have routes of other layers or other top-k")
    if record.get(PROMPT_ROUTES) is not None:
        num_prompt = len(parts[0])
        if prompt_ids is not None and len(prompt_ids) != num_prompt:
            raise ValueError(
                f"{where}: {PROMPT_ROUTES} has {num_prompt} rows for {len(prompt_ids)} tokens"
            )
    else:
        num_prompt = len(prompt_ids) if prompt_ids is not None else len(parts[0])
    return np.concatenate(parts), num_prompt
