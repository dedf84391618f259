"""The predictors' networks.

interface        what every predictor shares: batch, heads, targets, graph
causal           a causal transformer with a key/value cache; attention, block: its parts
t5               the paper's encoder-decoder
layer_ahead      small networks from a router input to the coming layers
"""
