"""The predictors' networks.

interface   the base of every predictor: batch, heads, targets, ONNX graph
causal      a causal transformer with a key/value cache; attention, block: its parts
t5          the paper's encoder-decoder
"""
