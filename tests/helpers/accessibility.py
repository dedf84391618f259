"""Findings of axe, the checker of accessibility, on a page in a browser."""

from __future__ import annotations

from typing import Any

import pytest


def findings(page: Any) -> list[str]:
    """Each rule that the page breaks as it is shown now, and where. Skips the test without axe."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    violations = axe.Axe().run(page).response["violations"]
    return [
        f"{found['impact']} {found['id']}: {' '.join(map(str, node['target']))}"
        for found in violations
        for node in found["nodes"]
    ]
