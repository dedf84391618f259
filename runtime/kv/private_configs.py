"""Configurations of a model's own, for as long as its attention is another one than usual.

Models that were made from one configuration share the object. Whoever runs another of them
meanwhile, in a hook or in a thread, must not see what was changed for this one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class PrivateConfigs:
    """Copies of the configurations that the modules of `model` read, with the given attention."""

    def __init__(self, model: nn.Module, attention: str) -> None:
        self._modules = [module for module in model.modules() if "config" in module.__dict__]
        self._attention = attention
        self._seen: dict[int, tuple[Any, dict[str, Any]]] = {}
        """The originals and their values, by their ids."""
        self._copies: dict[int, Any] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, the modules read the copies."""
        before = [module.__dict__["config"] for module in self._modules]
        try:
            for module, config in zip(self._modules, self._of(before), strict=True):
                module.__dict__["config"] = config
            yield
        finally:
            for module, config in zip(self._modules, before, strict=True):
                module.__dict__["config"] = config

    def _of(self, configs: list[Any]) -> list[Any]:
        """The same copies again, as long as the originals do not change."""
        seen = {id(config): (config, dict(vars(config))) for config in configs}
        if seen != self._seen:
            self._seen, self._copies = seen, _copies(configs, self._attention)
        return [self._copies[id(config)] for config in configs]


def _copies(configs: list[Any], attention: str) -> dict[int, Any]:
    """A copy of each distinct configuration, by the id of the original.

    A configuration within another one, of which copies share it, is copied as well.
    """
    copies = {id(config): copy.copy(config) for config in configs}
    for config in copies.values():
        for name, value in vars(config).items():
            vars(config)[name] = copies.get(id(value), value)
    for config in copies.values():
        vars(config)["_attn_implementation_internal"] = attention
    return copies
