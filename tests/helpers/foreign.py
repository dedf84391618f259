"""Traces rewritten in the formats of other programs, as those programs lay them out."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from routing.shards import PROMPT, Document, TraceReader, signed_experts

UNSAMPLED = 3
"""The id of a last token that was sampled and never run."""


def encoded_npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def with_dense_layers(experts_TLK: np.ndarray, numbers: list[int], count: int) -> np.ndarray:
    """The routes of all `count` layers of a model, those without experts zero."""
    full = np.zeros((len(experts_TLK), count, experts_TLK.shape[2]), experts_TLK.dtype)
    full[:, numbers] = experts_TLK
    return full


def split(document: Document) -> tuple[list[int], list[int]]:
    """The ids of the prompt and of the answer."""
    num_prompt = int((document.phase_T == PROMPT).sum())
    ids = document.token_ids_T.tolist()
    return ids[:num_prompt], [*ids[num_prompt:], UNSAMPLED]


def vllm_answer(document: Document) -> dict[str, Any]:
    """As the completions API answers with `return_token_ids`."""
    prompt, answer = split(document)
    choice = {"index": 0, "text": "", "token_ids": answer, "prompt_token_ids": prompt,
              "routed_experts": encoded_npy(document.experts_TLK)}  # fmt: skip
    return {"object": "text_completion", "choices": [choice], "label": document.label}


def vllm_output(document: Document) -> dict[str, Any]:
    """As a `RequestOutput` of a newer version, turned into lists."""
    prompt, answer = split(document)
    experts = document.experts_TLK.astype(np.int16)
    return {
        "request_id": "0",
        "prompt_token_ids": prompt,
        "prompt_routed_experts": experts[: len(prompt)].tolist(),
        "outputs": [
            {"index": 0, "token_ids": answer, "routed_experts": experts[len(prompt) :].tolist()}
        ],
        "label": document.label,
    }


def sglang_answer(document: Document) -> dict[str, Any]:
    """As `/generate` answers, with the request's `input_ids` beside it."""
    prompt, answer = split(document)
    routes = np.ascontiguousarray(document.experts_TLK, np.int32)
    return {
        "text": "",
        "input_ids": prompt,
        "output_ids": answer,
        "meta_info": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(answer),
            "routed_experts": base64.b64encode(routes.tobytes()).decode(),
        },
        "label": document.label,
    }


def passes(document: Document) -> list[slice]:
    """The prompt in one pass, then one token a pass."""
    num_prompt = int((document.phase_T == PROMPT).sum())
    length = len(document.token_ids_T)
    first = [slice(0, num_prompt)] if num_prompt else []
    return [*first, *(slice(t, t + 1) for t in range(num_prompt, length))]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_vllm(reader: TraceReader, path: Path) -> Path:
    return write_lines(path, [vllm_answer(document) for document in reader.documents()])


def write_sglang(reader: TraceReader, path: Path) -> Path:
    return write_lines(path, [sglang_answer(document) for document in reader.documents()])


def write_megatron(reader: TraceReader, directory: Path) -> Path:
    """One rank; experts ascending, as a routing map gives them."""
    directory.mkdir()
    records, step = [], 0
    for document in reader.documents():
        for span in passes(document):
            for layer in range(reader.stack.num_layers):
                experts_TK = np.sort(document.experts_TLK[span, layer], axis=-1)
                records.append(
                    {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer,
                     "rank": 0, "num_tokens": len(experts_TK), "topk": experts_TK.shape[1],
                     "top_indices": experts_TK.tolist()}
                )  # fmt: skip
            step += 1
    write_lines(directory / "router_trace_rank0.jsonl", records)
    return directory


def write_llama_cpp(reader: TraceReader, path: Path) -> Path:
    """Upstream's layout, all layers computed for all tokens."""
    lines = [
        f"{layer},{expert}\n"
        for document in reader.documents()
        for span in passes(document)
        for layer in range(reader.stack.num_layers)
        for expert in document.experts_TLK[span, layer].reshape(-1).tolist()
    ]
    path.write_text("".join(lines))
    return path


def write_npy(reader: TraceReader, path: Path) -> Path:
    """All documents in one .npz, layers first."""
    documents = list(reader.documents())
    experts_NLK = np.concatenate([document.experts_TLK for document in documents])
    np.savez(
        path,
        experts=signed_experts(experts_NLK, reader.stack.num_experts).swapaxes(0, 1),
        token_ids=np.concatenate([document.token_ids_T for document in documents]),
        doc_offsets=np.cumsum([0, *reader.doc_lengths]),
        num_prompt=np.array([(d.phase_T == PROMPT).sum() for d in documents]),
    )
    return path


WRITERS = {
    "vllm": (write_vllm, "answers.jsonl"),
    "sglang": (write_sglang, "answers.jsonl"),
    "megatron": (write_megatron, "run"),
    "llama.cpp": (write_llama_cpp, "moe_trace.csv"),
    "npy": (write_npy, "routes.npz"),
}
"""Format -> its writer, and the name of a file."""
WITH_IDS = ("vllm", "sglang", "npy")
