"""Comparison of predictors on held-out documents.

settings   the settings of `python -m predictor.evaluate`
baselines  predictors that need no training
scoring    the contenders and their scores
report     the scores as tables, JSON and a picture
"""
