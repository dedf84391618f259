"""All weights but the routed experts: a model built without its experts, in one thread alone.

skeleton       the model, built by transformers from tensors that are read when they are needed
default_dtype  torch's default number format, changed for one thread
"""
