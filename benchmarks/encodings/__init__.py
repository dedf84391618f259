"""Coded experts at equal GPU memory."""
