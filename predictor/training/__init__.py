"""Training on traces.

data, rows     traces as batches
module         the Lightning module; metrics, curves
optimizer      Muon and AdamW
calibration    logits as probabilities
checkpoint     reading what training wrote
embedding      starting from the target model's embedding
router_inputs  router inputs recorded for layer_ahead
"""
