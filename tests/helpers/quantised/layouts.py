"""All layouts of quantised checkpoints that tests write, by name.

A module of layouts is added as one row of MODULES.
"""

from __future__ import annotations

from tests.helpers.quantised import fp8_layouts, int4_layouts, mxfp4_layouts, nvfp4_layouts
from tests.helpers.quantised.layout import Layout

MODULES = (mxfp4_layouts, fp8_layouts, int4_layouts, nvfp4_layouts)

LAYOUTS: dict[str, Layout] = {
    name: layout for module in MODULES for name, layout in module.LAYOUTS.items()
}


def layouts_of(encoding: str) -> list[str]:
    """The layouts whose experts are in one encoding."""
    return [name for name, layout in LAYOUTS.items() if layout.encoding == encoding]
