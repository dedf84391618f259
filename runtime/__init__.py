"""The runtime: a mixture-of-experts model whose experts do not fit in memory, run exactly.

model = runtime.load("DIR_OR_ID", "predictor.onnx", memory="2GiB")
model.generate(...)
print(model.expertflow.report())

The public names below are imported when they are first used.

loading      `load`; offloaded_model: the type of what it returns
weights/     where experts come from
sizing/      memory budgets, in slots
cache/       which experts stay resident
prediction/  the route predictor beside the model
kv/          key/value caches
engine/      hooks on the model, and experts out of slots
cuda/        captured decode steps, kernels, pinned and packed experts
conversion/  lossy copies in a smaller encoding, and what they lost
serving/     many requests at once; server/: OpenAI's API over HTTP
simulation/  policies and predictors on recorded traces
plan, prepare, simulate, batch   commands: `python -m runtime.plan` ...
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.cache.stats import Stats
    from runtime.engine.engine import Engine
    from runtime.loading import load
    from runtime.offloaded_model import OffloadedModel
    from runtime.serving.request import Request, Result
    from runtime.serving.settings import ServeSettings

__all__ = ["Engine", "OffloadedModel", "Request", "Result", "ServeSettings", "Stats", "load"]

_HOMES = {
    "Engine": "runtime.engine.engine",
    "OffloadedModel": "runtime.offloaded_model",
    "Request": "runtime.serving.request",
    "Result": "runtime.serving.request",
    "ServeSettings": "runtime.serving.settings",
    "Stats": "runtime.cache.stats",
    "load": "runtime.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
