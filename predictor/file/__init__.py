"""The exported predictor: written, checked against torch, run over documents.

parity        onnxruntime against torch
quantization  int8 weights in blocks
documents     an exported predictor over whole documents
session       onnxruntime
"""
