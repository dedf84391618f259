"""The live part of the demo: one generation loop, everything resident and under every policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exports.comparison import Run, compare, generate_after

PROMPT_TOKENS = 48
SHOWN = ("math_qa", "en_prose")
"""Domains to show a continuation of; the first that is there."""


@dataclass(frozen=True, kw_only=True)
class LiveResult:
    """What the demo generated, how, and how fast."""

    runs: Sequence[Run]
    """One for each cache policy."""
    new_tokens: int
    """Tokens generated, over all prompts."""
    resident_seconds: float
    """Time of the same loop by the model itself, with every expert resident."""
    domain: str
    """Domain of the prompt shown."""
    prompt: str
    continuation: str

    @property
    def resident_rate(self) -> float:
        """Tokens a second with every expert resident."""
        return self.new_tokens / self.resident_seconds

    def rate(self, run: Run) -> float:
        """Tokens a second of an offloaded run."""
        return self.new_tokens / run.seconds


def generate(
    model_directory: Path,
    predictor: Path,
    prompts: Mapping[str, str],
    *,
    residency: float,
    new_tokens: int,
) -> LiveResult:
    """Generate after `prompts` (by domain) under every policy, then without offloading.

    Args:
        model_directory: The model, loaded once.
        predictor: ONNX file of its predictor.
        prompts: Text by domain; the first PROMPT_TOKENS tokens of each are used.
        residency: Share of the experts that are resident.
        new_tokens: Tokens to generate after each prompt.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model: Any = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    ids = {
        name: tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT_TOKENS]
        for name, text in prompts.items()
    }
    workload = generate_after(list(ids.values()), new_tokens)
    runs, _ = compare(model, workload, predictor=predictor, residency=[residency])
    start = time.perf_counter()  # the model again: without hooks on its experts, and warm
    tokens = dict(zip(ids, workload(model), strict=True))
    seconds = time.perf_counter() - start
    domain = next((name for name in SHOWN if name in ids), next(iter(ids)))
    width = ids[domain].shape[1]
    return LiveResult(
        runs=runs,
        new_tokens=sum(len(tokens[name]) - ids[name].shape[1] for name in ids),
        resident_seconds=seconds,
        domain=domain,
        prompt=tokenizer.decode(tokens[domain][:width]),
        continuation=tokenizer.decode(tokens[domain][width:]),
    )
