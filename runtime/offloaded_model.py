"""The type of an offloaded model, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from runtime.engine.engine import Engine


class OffloadedModel(PreTrainedModel, GenerationMixin):
    """A Hugging Face model with an engine attached: what `runtime.load` returns.

    A model keeps its own class, so no model is an instance of this one. Its experts are listed by
    `named_parameters` and `state_dict`, as placeholders without values: docs/models.md says what
    may be done to the model.
    """

    expertflow: Engine
    generate: Callable[..., Any]
    """`GenerationMixin.generate`, whose own annotations fit no single model class."""
