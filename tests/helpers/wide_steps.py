"""Captured steps of many rows, watched."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.cuda.wide.wide_rows import WideRows


def watch_wide_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each such step, in a list that grows as they are launched."""
    ran: list[int] = []
    launch = WideRows.launch

    def watched(self: Any, tokens: Any, *rest: Any) -> Any:
        ran.append(len(tokens))
        return launch(self, tokens, *rest)

    patch.setattr(WideRows, "launch", watched)
    return ran
