"""Training of route predictors on traces.

data, rows   traces as batches
module       the Lightning module; losses, metrics, curves
optimizer    Muon and AdamW
calibration  scale and shift of the logits, for calibrated probabilities
checkpoint   reading checkpoints of predictor.train
embedding    the traced model's token embedding, to start from
"""
