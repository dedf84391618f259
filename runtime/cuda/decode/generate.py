"""`generate` for an offloaded model: decode steps captured where they can be.

generate -> prefill (the model's forward, experts streamed) -> captured step, step, ...
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode

from runtime.cuda.decode.batch_decoder import BatchDecoder
from runtime.cuda.decode.decoder import Decoder
from runtime.cuda.decode.generate_loop import Prompt, decode, takes_over
from runtime.cuda.decode.graph_step import DecodeStep
from runtime.engine.next_tokens import NOT_FINITE
from runtime.prediction.route_log import RouteLog


class CapturedGenerate:
    """A stand-in for `model.generate` that decodes in captured steps where it can."""

    def __init__(self, model: Any, decoder: Decoder, route_log: RouteLog | None) -> None:
        self._model, self._decoder = model, decoder
        self.batch_decoder = BatchDecoder(decoder, route_log)
        self.num_rows: int | None = None
        """Sequences of the running generation; None: as many as a forward pass has."""
        self.mask_BT: Tensor | None = None
        """The mask of the prompt that runs; None between prompts."""
        self.why: str | None = "nothing has been generated yet"

    # ------------------------------------------------------------------ generate

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """The model's `generate`, decoding captured where it can."""
        outer = self.num_rows, self.mask_BT  # of a generation between whose tokens this one runs
        self.why, self.num_rows, self.mask_BT = (
            self._objection(generation_config, kwargs),
            None,
            None,
        )
        if self.why is None:
            kwargs["custom_generate"] = partial(self._decode, streamer=kwargs.get("streamer"))
        else:
            self._complain()
        try:
            return type(self._model).generate(self._model, inputs, generation_config, **kwargs)
        finally:
            self.num_rows, self.mask_BT = outer

    def _objection(self, generation_config: Any, kwargs: dict[str, Any]) -> str | None:
        reason = self._decoder.objection()
        if reason is not None:
            return reason
        for name in ("past_key_values", "custom_generate", "inputs_embeds"):
            if kwargs.get(name) is not None:
                return f"{name} is given"
        config = copy.deepcopy(generation_config or self._model.generation_config)
        config.update(**kwargs)
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"{mode.value} is not captured"
        return takes_over(config)

    def _complain(self) -> None:
        warnings.warn(f"decoding runs outside of CUDA graphs: {self.why}", stacklevel=3)

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        num_rows, longest = len(input_ids), generation_config.max_length
        storage = self._decoder.model.storage
        self.why = self._too_large(num_rows, longest)
        if self.why is None and storage.is_lent:
            self.why = "served sequences or another generation are in the key/value cache"
        if self.why is not None:
            self._complain()
            return type(model)._sample(
                model, input_ids, logits_processor, stopping_criteria, generation_config,
                synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
            )  # fmt: skip
        prompt = Prompt(
            input_ids,
            model_kwargs,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
        )
        storage.take(self)
        try:
            step = self.batch_decoder.step_for(num_rows)
            run = partial(self.batch_decoder.run, step, num_rows)
            return decode(prompt, partial(self._prefill, prompt, step), run)
        finally:
            self.batch_decoder.drain()
            storage.let_go(self)

    def _too_large(self, num_rows: int, longest: int) -> str | None:
        """Why captured steps cannot hold so many sequences of so many tokens; None: they can."""
        decoder, model = self._decoder, self._decoder.model
        if num_rows > model.batch:
            return f"{num_rows} sequences at once, load(..., batch={model.batch})"
        if (rows := model.bucket(num_rows)) > (most := model.storage.whole_rows):
            return (
                f"steps of {rows} sequences, and cache_tokens={model.storage.tokens} have room for "
                f"{most} of {model.context} tokens"
            )
        if longest > model.context:
            return f"up to {longest} tokens, load(..., context={model.context})"
        if (needed := decoder.most_experts(num_rows)) > decoder.num_slots:
            return f"they can need {needed} slots at once, and there are {decoder.num_slots}"
        return None

    # ------------------------------------------------------------------ prefill

    def _prefill(self, prompt: Prompt, step: DecodeStep) -> Tensor:
        """Run the prompt; rows beyond the batch repeat its last sequence."""
        num_rows, bucket = len(prompt.input_ids_BT), len(step.ids_B1)
        rows = torch.arange(bucket, device=prompt.input_ids_BT.device).clamp_(max=num_rows - 1)
        given = prompt.model_kwargs.items()
        kwargs = {name: _rows(name, value, rows, num_rows) for name, value in given}
        step.cache.reset()
        self.num_rows = num_rows
        kwargs["past_key_values"] = step.cache
        inputs = self._model.prepare_inputs_for_generation(
            prompt.input_ids_BT[rows], is_first_iteration=True, **kwargs
        )
        self.mask_BT = kwargs.get("attention_mask")
        try:
            logits_BV = self._model(**inputs, return_dict=True).logits[:, -1]
        finally:
            self.mask_BT = None
        if logits_BV.isnan().any():
            raise FloatingPointError(NOT_FINITE)
        length = prompt.input_ids_BT.shape[1]
        positions = kwargs.get("position_ids")
        following = rows * 0 + length if positions is None else positions[..., -1] + 1
        mask = kwargs.get("attention_mask")
        step.start(length, following, None if mask is None else mask.bool())
        next_B = following if following.dim() == 1 else following[0]
        self.batch_decoder.begin(next_B[:num_rows].cpu().numpy())
        return logits_BV[:num_rows]


def _rows(name: str, value: Any, rows: Tensor, num_rows: int) -> Any:
    """The given rows of a tensor with one entry a sequence; anything else as it is."""
    if name == "position_ids" and isinstance(value, Tensor):  # [B, T] or [3 or 4, B, T]
        return value[..., rows, :]
    is_batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_rows
    return value[rows] if is_batched else value
