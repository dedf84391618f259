"""Compiled decode steps: time until the first one, the switch of compile="auto", their numbers."""
