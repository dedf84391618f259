"""The predictor's ONNX file: the contract between `predictor` and `runtime` (docs/formats.md).

format  names, constants and metadata that writer and readers agree on
reader  opening and checking a file
driver  running its graph: past keys and values, and the head that older files lack
"""
