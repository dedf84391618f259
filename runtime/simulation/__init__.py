"""Cache policies and predictors compared on recorded traces, without a model.

trace_steps   recorded documents as steps
replay        policies over recorded steps
baselines     predictors that need no training
calibration, lookahead_contenders   look-ahead from a layer's router input
link_model    how long decoding would take on a link
comparison    every predictor and policy with one yardstick; report: the table
"""
