"""Recording the routing of a mixture-of-experts model (`python -m trace.collect`).

This package has the name of a standard library module and comes before it on the path. It serves
the names of that module too, so that no program notices: `trace.Trace`, `from trace import *`,
pickles of its classes and `python -m trace` work as ever.
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
    if isinstance(value, ModuleType):  # a module that it imports, such as `inspect`, is not its API
        raise AttributeError(f"module 'trace' has no attribute {name!r}")
    return value
