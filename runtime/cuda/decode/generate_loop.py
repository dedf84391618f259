"""The decode loop of `generate` over captured steps, in place of transformers' own.

It is handed to `generate` as `custom_generate`, so prompts, configurations, processors, criteria
and streamers are all prepared by the library. Greedy decoding without processors never touches the
device between steps: the graph has chosen the token and fed it to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput


class Prompt(NamedTuple):
    """The inputs that `generate` prepared."""

    input_ids_BT: Tensor
    model_kwargs: dict[str, Any]
    processors: Any
    criteria: Any
    config: GenerationConfig
    streamer: Any


def takes_over(config: GenerationConfig) -> str | None:
    """Why this loop cannot serve a generation; None where it can."""
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            return f"{name} is asked for"
    if config.use_cache is False:
        return "use_cache is off"
    if config.prefill_chunk_size is not None:
        return "prefill_chunk_size is set"
    return None


def decode(
    prompt: Prompt, prefill: Callable[[], Tensor], step: Callable[[Tensor | None, bool], Any]
) -> Any:
    """Generate after `prompt`.

    prefill: runs the prompt, returns logits [B, V]. step(tokens, more): runs one step for the given
    tokens [B], or for those that the last step chose by itself (None), and returns its
    `ChosenTokens`; `more` says that another step of its own tokens will follow, unless a sequence
    ends.
    """
    is_plain = (
        not prompt.config.do_sample
        and len(prompt.processors) == 0
        and all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in prompt.criteria)
    )
    sequences_BT = (_greedy if is_plain else _general)(prompt, prefill, step)
    if prompt.streamer is not None:
        prompt.streamer.end()
    if prompt.config.return_dict_in_generate:
        output: Any = GenerateDecoderOnlyOutput(sequences=sequences_BT)  # type: ignore[arg-type]
        return output
    return sequences_BT


def _greedy(prompt: Prompt, prefill: Callable[[], Tensor], step: Callable[..., Any]) -> Tensor:
    """Tokens are read back for the streamer and the criteria only."""
    ends = _end_tokens(prompt)
    longest = min(c.max_length for c in prompt.criteria if isinstance(c, MaxLengthCriteria))
    first_B = prefill().argmax(-1)
    given_B: Tensor | None = first_B
    tokens_B = first_B.tolist()
    finished = [False] * len(tokens_B)
    pad = _pad_token(prompt)
    columns: list[list[int]] = []
    while True:
        if ends:
            tokens_B = [pad if done else t for t, done in zip(tokens_B, finished, strict=True)]
            finished = [d or t in ends for t, d in zip(tokens_B, finished, strict=True)]
        columns.append(tokens_B)
        if prompt.streamer is not None:
            prompt.streamer.put(torch.tensor(tokens_B))
        length = prompt.input_ids_BT.shape[1] + len(columns)
        if all(finished) or length >= longest:
            break
        tokens_B, given_B = step(given_B, length + 1 < longest).tokens_B, None
    new_BT = torch.tensor(columns, device=prompt.input_ids_BT.device).T
    return torch.cat([prompt.input_ids_BT, new_BT], -1)


def _general(prompt: Prompt, prefill: Callable[[], Tensor], step: Callable[..., Any]) -> Tensor:
    """Any processors, criteria and sampling of transformers' own loop."""
    input_ids_BT = prompt.input_ids_BT
    unfinished_B = torch.ones(len(input_ids_BT), dtype=torch.int64, device=input_ids_BT.device)
    has_end = any(hasattr(criterion, "eos_token_id") for criterion in prompt.criteria)
    pad = _pad_token(prompt)
    logits_BV = prefill()
    while True:
        scores_BV = prompt.processors(input_ids_BT, logits_BV.to(torch.float32, copy=True))
        tokens_B = _choose(scores_BV, bool(prompt.config.do_sample))
        if has_end:
            tokens_B = tokens_B * unfinished_B + pad * (1 - unfinished_B)
        input_ids_BT = torch.cat([input_ids_BT, tokens_B[:, None]], -1)
        if prompt.streamer is not None:
            prompt.streamer.put(tokens_B.cpu())
        unfinished_B = unfinished_B & ~prompt.criteria(input_ids_BT, None)
        if not unfinished_B.any():
            return input_ids_BT
        logits_BV = step(tokens_B, False).logits_BV


def _choose(scores_BV: Tensor, sample: bool) -> Tensor:
    if not sample:
        return scores_BV.argmax(-1)
    return torch.multinomial(scores_BV.softmax(-1), num_samples=1)[:, 0]


def _end_tokens(prompt: Prompt) -> set[int]:
    criteria = [c for c in prompt.criteria if isinstance(c, EosTokenCriteria)]
    return {int(token) for criterion in criteria for token in criterion.eos_token_id}


def _pad_token(prompt: Prompt) -> int:
    pad = prompt.config._pad_token_tensor
    return 0 if pad is None else int(pad)
