"""Lanes of one recorded step or prompt: what link, CPU and GPU did, and the bound that they set."""
