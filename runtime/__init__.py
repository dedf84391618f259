"""The runtime: a mixture-of-experts model whose experts do not fit in memory, run exactly.

model = runtime.load("DIR_OR_ID", "predictor.onnx", memory="2GiB")
model.generate(...)
print(model.expertflow.report())

loading      `load`
weights/     where experts come from
sizing/      memory budgets, in slots
cache/       which experts stay resident
prediction/  the route predictor beside the model
kv/          key/value caches
engine/      hooks on the model, and experts out of slots
cuda/        captured decode steps, kernels, pinned and packed experts
serving/     many requests at once; server/: OpenAI's API over HTTP
simulation/  policies and predictors on recorded traces
plan, prepare, simulate, batch   commands: `python -m runtime.plan` ...
"""

from runtime.loading import load

__all__ = ["load"]
