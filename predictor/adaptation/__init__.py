"""Adaptation: an exported predictor trained further on recorded routes."""
