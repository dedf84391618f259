"""The predictors' networks.

windows     rows of traced tokens, and predictions for them; targets: their right answers
interface   the base of every predictor: heads, calibration, ONNX graph
causal      a causal transformer with a key/value cache; attention, block: its parts
t5          the paper's encoder-decoder
"""
