"""A batch served by one engine, in this process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from runtime.serving.batch.settings import BatchSettings, Served, serve_settings
from runtime.serving.request import Request


class LocalWorker:
    """One engine, in this process."""

    def __init__(self, settings: BatchSettings, tokenizer: Any) -> None:
        self._engine = settings.load(tokenizer)
        self._options = serve_settings(settings) | {"tokenizer": tokenizer}

    def serve(self, requests: Iterator[Request]) -> Iterator[Served]:
        """Results as they end."""
        with warnings.catch_warnings():  # a batch reports errors by their rows
            warnings.filterwarnings("ignore", message=".* ended with an error")
            for result in self._engine.serve(requests, **self._options):
                yield Served.by(self._engine.stats(), result)

    def report(self) -> str:
        """One line about the run so far."""
        return self._engine.report()

    def close(self) -> None:
        self._engine.detach()
