"""Greedy answers to simple questions, by the dense model and by smol-moe.

    python -m exports.smol.answers --model runs/smol-moe/model --json exports/smol-moe/answers.json

`python -m benchmarks.pages` puts them side by side in the card.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exports.smol.dense import find_gguf, read_dense, read_dense_tokenizer
from routing.cli import run

QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "How many days are in a week?",
    "What colour is the sky on a clear day?",
    "What is 2 + 2?",
    "What is the opposite of hot?",
    "Name three fruits.",
    "Who wrote Romeo and Juliet?",
    "What do cows drink?",
    "What is the largest planet in the solar system?",
    "What is the boiling point of water in degrees Celsius?",
    "Write one sentence about a cat.",
    "Translate 'good morning' into Spanish.",
    "What is the chemical symbol of gold?",
    "Write a Python function that returns the square of a number.",
    "Why do we have seasons?",
    "What is a computer?",
    "Give me a tip for learning English.",
    "How do I boil an egg?",
    "Which animal is known as man's best friend?",
)
MOST_TOKENS = 80


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Let the dense model and smol-moe answer the same questions, greedily."""

    model: Path
    """Directory of smol-moe, as `expertflow build smol-moe` writes it."""
    json: Path
    """File for questions and answers."""
    cache: Path | None = None
    """Folder for the package of the dense model, where it is not installed."""


def main(settings: AnswerSettings) -> None:
    """Write the answers."""
    rows = ask_both(settings.model, find_gguf(settings.cache))
    text = json.dumps({"answers": rows}, indent=1, ensure_ascii=False)
    settings.json.write_text(text + "\n", encoding="utf-8")


def ask_both(model_directory: Path, gguf: Path) -> list[dict[str, str]]:
    """The answers of the dense model and of the mixture to QUESTIONS."""
    from transformers import AutoModelForCausalLM

    tokenizer = read_dense_tokenizer(gguf)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = answers(read_dense(gguf, torch.bfloat16).to(device), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        model_directory, dtype=torch.bfloat16, trust_remote_code=False
    )
    own = answers(model.eval().to(device), tokenizer)
    return [
        {"question": question, "dense": one, "mixture": other}
        for question, one, other in zip(QUESTIONS, dense, own, strict=True)
    ]


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, questions: Sequence[str] = QUESTIONS) -> list[str]:
    """The greedy answer to each question, cut at MOST_TOKENS tokens."""
    found = []
    device = next(model.parameters()).device
    for question in questions:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MOST_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = output[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        found.append(text if tokenizer.eos_token_id in new else f"{text} …")
    return found


if __name__ == "__main__":
    run(
        main,
        AnswerSettings,
        prog="python -m exports.smol.answers",
        examples=["--model runs/smol-moe/model --json runs/answers.json"],
    )
