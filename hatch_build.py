"""Build hook: puts the startup files into editable wheels, which ignore `force-include`."""

import os
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StartupFiles(BuildHookInterface[Any]):
    """Adds `expertflow.pth` and `expertflow.start` to the wheel of `pip install --editable`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            for name in ("expertflow.pth", "expertflow.start"):
                build_data["force_include_editable"][os.path.join(self.root, name)] = name
