"""SGLang's `return_routed_experts`: saved answers with the experts of every token, JSON or JSONL.

Read from sgl-project/sglang #12162 (`/generate`: `meta_info.routed_experts`), #17434 (the OpenAI
endpoints: `choices[i].sgl_ext.routed_experts`) and docs/basic_usage/openai_api_completions.md.

`routed_experts` is base64 of int32 [N - start, F, K] without a header: N = prompt + generated - 1
tokens, since the last token sampled was never run, and `start` is the request's
`routed_experts_start_len`. F counts all layers of the model (dense ones hold zeros), or its MoE
layers alone. Its size follows from the counts of tokens in `meta_info` or `usage`.

Ids of the answer are `output_ids`, and those of the prompt `input_ids` where the request was saved
with the answer; or both from `input_token_logprobs` and `output_token_logprobs` (`return_logprob`
with `logprob_start_len` 0). Without them the trace has no token ids, so predictors refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from routing.topology import Stack
from trace.formats.arrays import count, decode_base64, from_bytes, part, records, token_list
from trace.formats.document import ForeignDocument, layer_columns
from trace.formats.settings import ImportSettings

ROUTES, START = "routed_experts", "routed_experts_start_len"
EXTENSIONS = ("sgl_ext", "sglext")


def read(path: Path, stack: Stack, options: ImportSettings) -> Iterator[ForeignDocument]:
    """The documents of a file, one for each answer. Raises ValueError."""
    for record, where in records(path):
        answers = record.get("choices") or [record]
        if not isinstance(answers, list) or not all(isinstance(x, dict) for x in answers):
            raise ValueError(f"{where}: its choices are no list of objects")
        for index, answer in enumerate(answers):
            place = where if len(answers) == 1 else f"{where}, choice {index}"
            yield _document({**record, **answer}, stack, place)


def _document(answer: dict[str, Any], stack: Stack, where: str) -> ForeignDocument:
    meta = part(answer, "meta_info", where)
    places = [meta, *(part(answer, name, where) for name in EXTENSIONS), answer]
    text = next((place[ROUTES] for place in places if place.get(ROUTES) is not None), None)
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: it has no {ROUTES}: start SGLang with --enable-return-routed-experts and "
            "ask for return_routed_experts"
        )
    prompt_ids = _ids(answer, meta, "input_ids", "input_token_logprobs", where)
    ids = _ids(answer, meta, "output_ids", "output_token_logprobs", where)
    counts = part(answer, "usage", where) or meta
    num_prompt = _length(prompt_ids, counts, "prompt_tokens", where)
    num_answer = _length(ids, counts, "completion_tokens", where)
    start = count(answer.get(START) or meta.get(START) or 0, START, where)
    tokens = None
    if num_prompt is not None and num_answer is not None:
        tokens = num_prompt + num_answer - 1 - start
    rows_TFK = _rows(decode_base64(text, where), stack, tokens, where)
    known = None
    if prompt_ids is not None and ids is not None:
        known = np.array([*prompt_ids, *ids][start : start + len(rows_TFK)], np.int64)
    of_prompt = len(rows_TFK) if num_prompt is None else max(num_prompt - start, 0)
    return ForeignDocument(
        rows_TFK[:, layer_columns(range(rows_TFK.shape[1]), stack, where)],
        known,
        min(of_prompt, len(rows_TFK)),
        where,
        None if answer.get("label") is None else str(answer["label"]),
    )


def _length(ids: list[int] | None, counts: dict[str, Any], name: str, where: str) -> int | None:
    """The number of tokens, by their ids or else as the record counts them."""
    if ids is not None:
        return len(ids)
    return None if counts.get(name) is None else count(counts[name], name, where)


def _ids(
    answer: dict[str, Any], meta: dict[str, Any], key: str, logprobs: str, where: str
) -> list[int] | None:
    if answer.get(key) is not None:
        return token_list(answer[key], where)
    entries = meta.get(logprobs)
    if entries is None:
        return None
    try:
        return token_list([entry[1] for entry in entries], where)
    except (TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{where}: {logprobs} are no [logprob, id, text]") from error


def _rows(data: bytes, stack: Stack, tokens: int | None, where: str) -> np.ndarray:
    """The routes [tokens, F, K]; F from the count of tokens, or else that of the MoE layers."""
    values = from_bytes(data, np.dtype(np.int32), -1, where)
    if tokens is None:
        width = stack.num_layers * stack.top_k
        if len(values) % width:
            raise ValueError(
                f"{where}: {len(values)} expert ids are no whole tokens of {stack.num_layers} "
                f"layers of {stack.top_k}, and the record counts no tokens (meta_info or usage)"
            )
        return values.reshape(-1, stack.num_layers, stack.top_k).astype(np.int64)
    width, rest = divmod(len(values), max(tokens, 1))
    if tokens < 0 or rest or width % stack.top_k or width == 0:
        raise ValueError(
            f"{where}: {len(values)} expert ids are not those of {tokens} tokens with "
            f"{stack.top_k} experts in each layer: cut, or of another model"
        )
    return values.reshape(tokens, -1, stack.top_k).astype(np.int64)
