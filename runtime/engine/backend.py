"""The contract of a backend: where the experts of a model run, and on what device.

    Engine --begin_forward, begin_step--> Backend   one forward pass of the model
           --run_layer-->                           the experts call of each MoE layer in it
           --end_forward-->
    Backend.generate            what stands in for the model's own `generate`, if anything
    Backend.row_decoder         captured steps for `engine.serve`, if there are any

A backend owns the slots, the expert cache of each pool, its policy and the counts (`stats`). It
knows nothing of hooks, nor of what the model is otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from routing.layers import MoELayer, Routes
from runtime.cache.forecast import Forecast
from runtime.cache.stats import Stats
from runtime.engine.next_tokens import NextTokens
from runtime.engine.step_inputs import StepInputs
from runtime.kv.row_cache import RowCache
from runtime.kv.storage import Storage

FindRoutes = Callable[[], np.ndarray]
"""Gives routes to whoever asks for them: most steps run unobserved."""


class RowDecoder(Protocol):
    """Captured steps over any rows of a key/value cache."""

    attend_singles: Callable[..., Tensor]
    """Attention of single tokens of many sequences, in transformers' terms."""

    def fits(self, num_rows: int) -> bool:
        """Whether so many sequences can decode in one captured step."""

    @property
    def is_starved(self) -> bool:
        """Whether most experts have no slot: then the link is the bound."""

    def use(self, cache: RowCache) -> None:
        """Attend to the rows of `cache`, as they are now, in the next step."""

    def launch(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        forecast: Forecast | None,
    ) -> Any:
        """Enqueue one step: a token of each sequence, with its row and position."""

    def revise(self, forecast: Forecast | None) -> None:
        """Take a better forecast of the step under way."""

    def finish(self, run: Any) -> tuple[NextTokens, FindRoutes]:
        """Wait for a launched step: the B next tokens, and what finds its routes [B, L, K]."""


class Backend(Protocol):
    """Runs the experts calls of one model. L layers, E experts, K experts a token, T tokens."""

    stats: Stats

    @property
    def generate(self) -> Callable[..., Any] | None:
        """Stands in for the model's `generate`; None: the model's own does."""

    def begin_forward(self) -> None:
        """A forward pass of the model begins, outside of captured steps."""

    def end_forward(self, *_: Any) -> None:
        """That forward pass has ended, or failed."""

    def begin_step(self, forecast: Forecast | None) -> None:
        """Move the cache's policy on to the pass about to run; None where nothing is predicted."""

    @property
    def is_capturing(self) -> bool:
        """Whether the model's forward runs as (the capture of) a step right now."""

    def run_captured(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts call of layer `index` inside a captured step."""

    def run_layer(self, layer: MoELayer, index: int, hidden_TH: Tensor, routes: Routes) -> Tensor:
        """The experts call of layer `index` outside of captured steps: [T, H]."""

    def read_expert(self, index: int, expert: int) -> dict[str, Tensor]:
        """A copy of one expert of layer `index` on the device, out of the host tier, not a slot.

        Any thread may call it, at any time.
        """

    def predict_beside(self, inputs: StepInputs) -> bool:
        """Start a prediction that runs beside this forward pass; False where there is none."""

    def learn(self, routes_BLK: np.ndarray) -> bool:
        """Keep the true routes of each sequence's last token for predictions made beside passes;
        False where there are none.
        """

    @property
    def num_rows(self) -> int | None:
        """Sequences of the running forward pass; further rows are padding. None: all rows count."""

    @property
    def mask_BT(self) -> Tensor | None:
        """Zero for the padding of the running prompt, where the call's own mask does not say."""

    def resident_LE(self) -> np.ndarray:
        """Bool [L, E]: the experts that are in slots."""

    def seconds_per_load(self) -> float:
        """Time to load one expert; 0 where that is not known yet."""

    @property
    def key_value_storage(self) -> Storage | None:
        """The key/value cache that captured steps share; None where there is none."""

    def row_decoder(self, cache: RowCache) -> RowDecoder | None:
        """Captured steps over the rows of a `RowCache`; None where experts have no kernels."""

    @property
    def decode_path(self) -> str:
        """Either "graph", or why decode steps are not captured."""

    @property
    def prefetching(self) -> str:
        """Whether experts are prefetched, and why, in a sentence."""

    @property
    def cpu_share(self) -> str:
        """Whether the CPU computes missed experts beside a GPU, and why, in a sentence."""

    def check_integrity(self) -> None:
        """Assert that every slot has one owner and that resident + free = capacity."""

    def guard(self) -> AbstractContextManager[Any]:
        """The context of every turn, in the thread that has it."""

    def close(self) -> None:
        """Free the slots, and give experts that were taken over back to their store."""
