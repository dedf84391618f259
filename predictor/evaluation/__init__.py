"""Predictors compared on held-out documents.

baselines  predictors that need no training
scoring    every contender scored
report     the table, the JSON, the picture
"""
