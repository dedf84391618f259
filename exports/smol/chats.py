"""Chats that the dense model writes itself, on which the upcycled one must not differ from it.

Half of them answer questions made from templates; in the other half the model writes the user's
turn as well (after Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exports.smol.text import TokenIds

TEMPERATURE = 0.8
MOST_LIKELY = 50
"""Tokens that are drawn from."""

SUBJECTS = (
    "gravity", "the water cycle", "photosynthesis", "electricity", "volcanoes", "the moon", "money",
    "democracy", "vaccines", "the internet", "a computer program", "an atom", "rainbows", "sleep",
    "the heart", "dinosaurs", "climate change", "recycling", "magnets", "bees", "the stock market",
    "a black hole", "DNA", "earthquakes", "music", "the Roman Empire", "chess", "bread", "trees",
    "a library", "the ocean", "friendship", "a good diet", "time zones", "batteries", "fractions",
)  # fmt: skip
COUNTRIES = (
    "Italy", "Spain", "Egypt", "Canada", "Brazil", "India", "China", "Mexico", "Kenya", "Norway",
    "Greece", "Portugal", "Poland", "Turkey", "Peru", "Chile", "Austria", "Ireland", "Thailand",
    "Vietnam", "Sweden", "Finland", "Cuba", "Nigeria", "Morocco", "South Korea", "Argentina",
)  # fmt: skip
TASKS = (
    "make pancakes", "learn to swim", "write a letter", "plant tomatoes", "clean a window",
    "fix a flat tyre", "study for an exam", "save money", "learn a language", "bake a cake",
    "train a dog", "make new friends", "sleep better", "start running", "cook rice", "read faster",
    "prepare for an interview", "pack a suitcase", "take better photos", "grow herbs indoors",
)  # fmt: skip
PROGRAMS = (
    "adds two numbers", "reverses a string", "finds the largest number in a list", "counts words",
    "checks whether a number is even", "computes a factorial", "sorts a list of names",
    "reads a file line by line", "converts Celsius to Fahrenheit", "removes duplicates from a list",
)  # fmt: skip
TEMPLATES: tuple[tuple[str, Sequence[str]], ...] = (
    ("What is {}?", SUBJECTS),
    ("Explain {} in simple terms.", SUBJECTS),
    ("Why is {} important?", SUBJECTS),
    ("Write a short poem about {}.", SUBJECTS),
    ("Write a short story about {}.", SUBJECTS),
    ("Give me three facts about {}.", SUBJECTS),
    ("Summarise what is known about {} in two sentences.", SUBJECTS),
    ("What is the capital of {}?", COUNTRIES),
    ("Tell me something interesting about {}.", COUNTRIES),
    ("What food is {} known for?", COUNTRIES),
    ("Which language do people speak in {}?", COUNTRIES),
    ("How do I {}?", TASKS),
    ("Give me three tips to {}.", TASKS),
    ("I want to {}. Where should I start?", TASKS),
    ("Write a Python function that {}.", PROGRAMS),
    ("Write a JavaScript function that {}.", PROGRAMS),
)
GREETINGS = (
    "Hello!", "Hi, how are you?", "Good morning!", "Who are you?", "What can you do?", "Thank you!",
    "Tell me a joke.", "I am bored. What should I do?", "What is your name?", "Can you help me?",
)  # fmt: skip


def questions() -> Iterator[str]:
    """All questions of the templates, and sums of small numbers."""
    yield from GREETINGS
    for template, words in TEMPLATES:
        yield from map(template.format, words)
    yield from (f"What is {a} + {b}?" for a, b in product(range(3, 30, 4), range(2, 40, 5)))


def chat_prompts(tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Token ids before what the model writes: an answer, or in every second chat a question too."""
    generator = random.Random(seed)
    pool = list(questions())
    generator.shuffle(pool)
    asked = list(islice((pool[i % len(pool)] for i in range(count)), (count + 1) // 2))
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in asked
    ]
    mark = "<|im_start|>user\n"
    texts += [texts[0].partition(mark)[0] + mark] * (count - len(texts))
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@torch.no_grad()
def write_chats(
    model: Any, prompts: Sequence[Sequence[int]], *, end: int, new_tokens: int, seed: int
) -> TokenIds:
    """Sample a continuation of every prompt, all at once; the chats one after the other.

    A chat whose question the model writes too goes on with its answer: it is cut after the second
    `end`, and others after the first.
    """
    width = max(map(len, prompts))
    padded = torch.tensor([[end] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    written_BT = _sample(model, padded.to(device), mask.to(device), new_tokens).cpu().numpy()
    shortest = min(map(len, prompts))
    chats = []
    for ids, row in zip(prompts, written_BT, strict=True):
        turns = 2 if len(ids) == shortest else 1
        ends = np.flatnonzero(row == end)
        length = ends[turns - 1] + 1 if len(ends) >= turns else new_tokens
        chats.append(np.concatenate([ids, row[:length]]))
    order = np.random.default_rng(seed).permutation(len(chats))
    return np.concatenate([chats[i] for i in order]).astype(np.uint16)


def _sample(model: Any, ids_BT: Tensor, mask_BT: Tensor, new_tokens: int) -> Tensor:
    """New tokens of each sequence, int64 [B, new tokens]; padding is on the left."""
    cache: Any = None
    written: list[Tensor] = []
    while len(written) < new_tokens:
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        likely = (output.logits[:, -1].float() / TEMPERATURE).topk(MOST_LIKELY)
        drawn_B1 = torch.multinomial(likely.values.softmax(-1), 1)
        ids_BT = likely.indices.gather(1, drawn_B1)
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)
        written.append(ids_BT)
    return torch.cat(written, 1)
