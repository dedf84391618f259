"""Makes `import routing, trace, predictor, runtime, exports` work wherever ExpertFlow is installed.

The packages lie in one folder: the checkout, or `site-packages/expertflow/` of an installed wheel,
where this file is that folder's `__init__.py`. Interpreters put the folder on their path at start,
through `expertflow.pth` (to Python 3.17) and `expertflow.start` (from Python 3.15, PEP 829).
Where neither file is read (`pip install --target`, a zip), call `activate()` before other imports.
"""

import os
import sys

__path__: list[str] = []  # no `expertflow.routing`: that would be a second copy of every class


def activate() -> None:
    """Put the folder of the packages on `sys.path`, before the standard library for `trace`'s sake.

    It goes directly before the standard library, so that the current directory, the script's folder
    and `PYTHONPATH` keep their precedence.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    library = os.path.dirname(os.__file__)
    before = sys.path.index(library) if library in sys.path else 0
    if here not in sys.path[:before]:
        sys.path.insert(before, here)
