"""Learns where a Mixture-of-Experts model will route its tokens, from a trace.

`python -m predictor.train fit` trains on a trace directory, `python -m predictor.export` writes the
ONNX file that the runtime reads.
"""
