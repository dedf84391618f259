"""The embedded model, its predictor and sample text, and the demo on them."""
