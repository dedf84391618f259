"""A model that traces batches of documents: one `Document` for each stack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from routing.lookahead import GATE, LookAhead
from routing.shards import GENERATED, PROMPT, Document
from routing.trace_format.extras import Extras, RouterLogits
from trace.batches import padded
from trace.recorder import Recorder, Recording
from trace.sources import Prompt

BatchTracer = Callable[
    [Iterator[list[Prompt]]], Iterator[tuple[list[Prompt], list[dict[str, Document]]]]
]
"""Takes batches; returns each with its traced documents, in the same order."""


class Passage(NamedTuple):
    """The tokens of one document that one stack of layers read."""

    start: int
    """Where they begin in the padded sequence."""
    ids: list[int]
    num_prompt: int
    """Tokens of the prompt; the rest were generated."""


class Runner:
    """Runs a model on documents and, with `generate`, on its continuation of each.

    The last generated token is never recorded: no forward pass reads it.
    """

    def __init__(
        self,
        model: Any,
        *,
        generate: int = 0,
        sample: bool = False,
        weights: bool = False,
        lookahead: int = 0,
        extras: Extras | None = None,
    ) -> None:
        self.model = model
        self.encoder_decoder = bool(self.model.config.is_encoder_decoder)
        if self.encoder_decoder and not generate:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder model, whose decoder reads only "
                "what it has generated: give --generate N"
            )
        self.generate = generate
        self.sample = sample
        self.weights = weights
        self.lookahead = lookahead
        """For the `Recorder`: layers ahead whose gates are asked early."""
        self.extras = extras or Extras()
        """For the `Recorder`: router logits and router inputs to keep."""

    @property
    def _token_config(self) -> Any:
        """The configuration with the special tokens: a model that cannot generate has only one."""
        return getattr(self.model, "generation_config", self.model.config)

    @property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end a generation."""
        ids = self._token_config.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def pad_id(self) -> int:
        """Id of the padding token. Any would do: padding is masked out."""
        configured = self._token_config.pad_token_id
        return configured if configured is not None else (self.end_ids or [0])[0]

    @torch.inference_mode()
    def run(
        self, recorder: Recorder, batch: Sequence[Prompt], *, seed: int = 0
    ) -> list[dict[str, Document]]:
        """Trace `batch`. Returns {stack name: document} for each of its prompts.

        `seed` matters only when sampling. Raises ValueError if a router weight is NaN.
        """
        torch.manual_seed(seed)
        passages = self._generate(batch) if self.generate else self._read(batch)
        recordings = recorder.take(len(batch))
        return [
            {
                stack: self._document(recording, row, passages[row][stack], batch[row])
                for stack, recording in recordings.items()
            }
            for row in range(len(batch))
        ]

    def _inputs(self, batch: Sequence[Prompt], *, left: bool) -> dict[str, Tensor]:
        ids_BT, mask_BT = padded(batch, self.pad_id, left=left)
        device = self.model.device
        return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}

    def _read(self, batch: Sequence[Prompt]) -> list[dict[str, Passage]]:
        """One forward pass without the language-model head: routes need no logits."""
        self.model.base_model(**self._inputs(batch, left=False), use_cache=False)
        return [{"decoder": Passage(0, prompt.ids, len(prompt.ids))} for prompt in batch]

    def _generate(self, batch: Sequence[Prompt]) -> list[dict[str, Passage]]:
        inputs = self._inputs(batch, left=not self.encoder_decoder)
        config = self._generation_config()
        sequences = self.model.generate(**inputs, generation_config=config).tolist()
        width = inputs["input_ids"].shape[1]
        return [
            self._passages(prompt, sequence, width)
            for prompt, sequence in zip(batch, sequences, strict=True)
        ]

    def _generation_config(self) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens, config.max_length = self.generate, None
        config.do_sample = self.sample
        config.num_beams = config.num_return_sequences = 1
        config.return_dict_in_generate = False
        config.disable_compile = True
        config.pad_token_id = self.pad_id
        return config

    def _passages(self, prompt: Prompt, sequence: list[int], width: int) -> dict[str, Passage]:
        """The passage of each stack: prompt and answer together, or one for each of two stacks."""
        length = len(prompt.ids)
        if not self.encoder_decoder:
            start = width - length
            return {"decoder": Passage(start, self._as_read(sequence, start, width), length)}
        return {
            "encoder": Passage(0, prompt.ids, length),
            "decoder": Passage(0, self._as_read(sequence, 0, 1), 1),
        }

    def _as_read(self, sequence: list[int], start: int, answer: int) -> list[int]:
        """The tokens that were read: from `start` up to, not including, the answer's last token.

        The answer begins at `answer` and ends at its first end token, or with `sequence`.
        """
        ends = (i for i in range(answer, len(sequence)) if sequence[i] in self.end_ids)
        return sequence[start : next(ends, len(sequence) - 1)]

    def _document(
        self, recording: Recording, row: int, passage: Passage, prompt: Prompt
    ) -> Document:
        span = slice(passage.start, passage.start + len(passage.ids))
        broken = recording.nan_layer(row, span)
        if broken is not None:
            raise ValueError(
                f"router weights are NaN in {broken}, in document {prompt.number} "
                f"(label {prompt.label}); the shards written before it are intact"
            )
        phase_T = np.full(len(passage.ids), GENERATED, np.uint8)
        phase_T[: passage.num_prompt] = PROMPT
        return Document(
            np.array(passage.ids, np.int32),
            recording.experts_BTLK[row, span],
            phase_T,
            prompt.label,
            recording.weights_BTLK[row, span] if self.weights else None,
            {}
            if recording.ahead is None
            else {GATE: LookAhead(*(x[row, span] for x in recording.ahead))},
            None
            if recording.router is None
            else RouterLogits(*(x[row, span] for x in recording.router)),
            {layer: rows[row, span] for layer, rows in recording.hidden.items()},
        )
