"""Adaptation: an exported predictor trained further on recorded routes.

candidate             the whole of it: a trained file beside its start, and the figures of both
starting              files to start from, and to write
graph, operators      a file's graph as a torch module
division              documents to train on, to stop by and to judge by
fine_tuning           the steps
recalibration, scores
"""
