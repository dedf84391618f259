"""The runtime: a Mixture-of-Experts model whose experts do not fit, generating all the same.

model = runtime.load("DIR_OR_ID", "predictor.onnx", memory="2GiB")
model.generate(...)
print(model.expertflow.report())
"""

from runtime.load import load

__all__ = ["load"]
