"""Lossy encodings of a small model: what each rounding costs, and what routes become of it."""
