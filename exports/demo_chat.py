"""A chat in the terminal with a model most of whose experts are not in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SMOL_MODEL = Path("runs/smol-moe/model")
"""The checkpoint that `expertflow build smol-moe --out runs/smol-moe` writes."""
SMOL_PREDICTOR = Path(__file__).parent / "predictors" / "smol-moe.onnx"
NEW_TOKENS = 256
"""Longest answer, in tokens."""
HELP = "Type a line. /new forgets the conversation, /quit ends."

Message = dict[str, str]


def chat(model_directory: Path, predictor: Path | None, *, residency: float) -> None:
    """Answer the lines of standard input until it ends, with `residency` of the experts in memory.

    Raises ValueError where the model is missing.
    """
    from transformers.utils import logging

    import runtime
    from routing.pretrained import read_tokenizer

    if not (model_directory / "config.json").is_file():
        raise ValueError(
            f"{model_directory} has no model to chat with: expertflow build smol-moe --out "
            f"{SMOL_MODEL.parent} writes one, or name another with --model"
        )
    logging.disable_progress_bar()
    tokenizer = read_tokenizer(model_directory)
    model = runtime.load(str(model_directory), predictor, memory=residency)
    with model.expertflow as engine:
        print(f"{model_directory}: {residency:.0%} of the experts in memory. {HELP}", flush=True)
        for _ in conversation(model, tokenizer, _lines()):
            print(f"  [{engine.report()}]\n", flush=True)


def conversation(model: Any, tokenizer: Any, lines: Iterable[str]) -> Iterator[str]:
    """Answer each line, greedily, printing the answer as it comes; yields it when it is whole."""
    messages: list[Message] = []
    for line in lines:
        if line == "/quit":
            return
        if line == "/new":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            answer = answer_to(model, tokenizer, messages)
            messages.append({"role": "assistant", "content": answer})
            yield answer


def answer_to(model: Any, tokenizer: Any, messages: list[Message]) -> str:
    """The answer to a conversation, whose oldest turns are dropped while it is too long."""
    import torch
    from transformers import TextStreamer

    from runtime.serving.chat import render_chat

    room = model.config.max_position_embeddings - NEW_TOKENS
    while len(ids := render_chat(tokenizer, messages)) > room and len(messages) > 1:
        del messages[:2]
    if len(ids) > room:
        raise ValueError(f"a message of {len(ids)} tokens is too long: {room} fit")
    ids_1T = torch.tensor([ids], device=model.device)
    output_1T = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return str(tokenizer.decode(output_1T[0, len(ids) :], skip_special_tokens=True)).strip()


def _lines() -> Iterator[str]:
    """The lines of standard input; a prompt goes before each where somebody types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
