"""ExpertFlow: mixture-of-experts models with most of their experts outside GPU memory.

    import expertflow

    model = expertflow.load("DIR_OR_ID", "predictor.onnx", memory="2GiB")
    model.generate(...)
    print(model.expertflow.report())

`load`, `Engine`, `OffloadedModel`, `Request`, `Result`, `ServeSettings` and `Stats` are those of
`runtime`, imported when they are first used: importing this module loads no library.

This file is also what makes `import routing, trace, predictor, runtime, exports` work wherever
ExpertFlow is installed. The packages lie in one folder: the checkout, or
`site-packages/expertflow/` of an installed wheel, where this file is that folder's `__init__.py`.
Interpreters put the folder on their path at start, through `expertflow.pth` (to Python 3.17) and
`expertflow.start` (from Python 3.15, PEP 829). Where neither file is read (`pip install --target`,
a zip), call `activate()` before other imports.
"""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime import (
        Engine,
        OffloadedModel,
        Request,
        Result,
        ServeSettings,
        Stats,
        load,
    )

    __version__: str

__all__ = [
    "Engine",
    "OffloadedModel",
    "Request",
    "Result",
    "ServeSettings",
    "Stats",
    "__version__",
    "activate",
    "load",
    "main",
]

_FOLDER = os.path.dirname(os.path.abspath(__file__))

# `python -m expertflow` finds `__main__` there. There is no `expertflow.routing`: that would be a
# second copy of every class.
__path__: list[str] = [os.path.join(_FOLDER, "routing", "command")]


def activate() -> None:
    """Put the folder of the packages on `sys.path`, before the standard library for `trace`'s sake.

    It goes directly before the standard library, so that the current directory, the script's folder
    and `PYTHONPATH` keep their precedence.
    """
    library = os.path.dirname(os.__file__)
    before = sys.path.index(library) if library in sys.path else 0
    if _FOLDER in sys.path[:before]:
        return
    while _FOLDER in sys.path:
        sys.path.remove(_FOLDER)
    sys.path.insert(before, _FOLDER)


def main() -> None:
    """Run the command `expertflow`."""
    activate()
    from routing.command import main as run

    run()


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in __all__:
        activate()
        import runtime

        value = getattr(runtime, name)
    else:
        raise AttributeError(f"module 'expertflow' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version in the checkout's `pyproject.toml`, or of the installed distribution."""
    path = os.path.join(_FOLDER, "pyproject.toml")
    if os.path.exists(path):
        import tomllib

        with open(path, "rb") as file:
            return str(tomllib.load(file)["project"]["version"])
    from importlib.metadata import version

    return version("moe-expertflow")


if __name__ == "__main__":
    main()
