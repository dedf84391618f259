"""The exported predictor: written, checked against torch, run over documents.

parity        onnxruntime against torch
quantization  int8 blocks
graph         an exported predictor over whole documents
session       onnxruntime
"""
