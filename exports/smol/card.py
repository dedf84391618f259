"""Tables of smol-moe's card, written from its records, and the answers that are one of them.

    python -m exports.smol.card --model runs/smol-moe/model

In FOLDER/README.md the text between `<!-- table: NAME -->` and `<!-- end -->` is replaced; the
names are `perplexity` and `routing` (from training.json) and `answers` (from answers.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exports.smol.dense import find_gguf, read_dense, read_dense_tokenizer
from routing.cli import run

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
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
class CardSettings:
    """Write the tables of smol-moe's card from its records."""

    folder: Path = Path("exports/smol-moe")
    """Folder of README.md, training.json and answers.json."""
    model: Path | None = None
    """Directory of smol-moe: it and the dense model first answer the questions of answers.json."""
    cache: Path | None = None
    """Folder for the package of the dense model, where it is not installed."""


def main(settings: CardSettings) -> None:
    """Rewrite the card's tables."""
    if settings.model is not None:
        rows = ask_both(settings.model, find_gguf(settings.cache))
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        (settings.folder / "answers.json").write_text(text + "\n", encoding="utf-8")
    card = settings.folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(with_tables(text, settings.folder), encoding="utf-8")


def ask_both(model_directory: Path, gguf: Path) -> list[dict[str, str]]:
    """The answers of the dense model and of the mixture to QUESTIONS."""
    from transformers import AutoModelForCausalLM

    tokenizer = read_dense_tokenizer(gguf)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = answers(read_dense(gguf, torch.bfloat16).to(device), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16)
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


def with_tables(text: str, folder: Path) -> str:
    """A card with its tables as the records in `folder` have them. Raises ValueError."""

    def table(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}: there are {', '.join(TABLES)}")
        record, write = TABLES[name]
        path = folder / record
        if not path.is_file():
            raise ValueError(f"{path} not found, which the table {name} is made of")
        return f"{found[1]}{write(json.loads(path.read_text(encoding='utf-8')))}{found[3]}"

    return BLOCK.sub(table, text)


def perplexity_table(record: dict[str, Any]) -> str:
    """Perplexity of every domain, by the dense model and by the mixture."""
    lines = ["| domain | tokens trained on | dense | smol-moe | change |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, row in record["held_out"]["perplexity"].items():
        trained = record["tokens"].get(name)
        change = row["mixture"] / row["dense"] - 1
        lines.append(
            f"| {name} | {'none' if trained is None else f'{trained:,}'} | {row['dense']:.2f} | "
            f"{row['mixture']:.2f} | {change:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def routing_table(record: dict[str, Any]) -> str:
    """Entropy of the experts' usage by domain, and the share of its two most used experts."""
    usage = record["routing"]
    lines = [
        "| domain | usage entropy | share of the two most used experts |",
        "| --- | ---: | ---: |",
    ]
    for name, entropy in usage["entropy_by_domain"].items():
        tops = [sum(sorted(layer)[-2:]) for layer in usage["shares"][name]]
        lines.append(f"| {name} | {entropy:.3f} | {sum(tops) / len(tops):.1%} |")
    lines.append(f"| **all** | {usage['entropy']:.3f} | |")
    return "\n".join(lines) + "\n"


def answer_table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of rows with `question`, `dense` and `mixture`."""
    lines = ["| question | dense | smol-moe |", "| --- | --- | --- |"]
    lines += [f"| {_cell(r['question'])} | {_cell(r['dense'])} | {_answer(r)} |" for r in rows]
    return "\n".join(lines) + "\n"


def _answer(row: dict[str, str]) -> str:
    return "*the same*" if row["mixture"] == row["dense"] else _cell(row["mixture"])


def _cell(text: str) -> str:
    return " ⏎ ".join(text.replace("|", "\\|").split("\n"))


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "perplexity": ("training.json", perplexity_table),
    "routing": ("training.json", routing_table),
    "answers": ("answers.json", answer_table),
}


if __name__ == "__main__":
    run(main, CardSettings, prog="python -m exports.smol.card", examples=[""])
