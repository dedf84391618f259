"""Recording the routing of a mixture-of-experts model (`python -m trace.collect`).

This package has the name of a module of the standard library and stands before it on the path.
So that no program notices, the names of that module are served from here too:
`trace.Trace`, `from trace import *`, pickles of its classes and `python -m trace` work as ever.
"""

from functools import cache
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from sysconfig import get_path
from types import ModuleType


@cache
def standard_library_trace() -> ModuleType:
    """Load the standard library's `trace` module, without entering it in `sys.modules`."""
    spec = PathFinder.find_spec("trace", [get_path("stdlib")])
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def __getattr__(name: str) -> object:
    value = getattr(standard_library_trace(), name)
    if isinstance(value, ModuleType):  # an import of its own, as `inspect` is: not part of its API
        raise AttributeError(f"module 'trace' has no attribute {name!r}")
    return value
