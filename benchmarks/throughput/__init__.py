"""Throughput of many sequences at once."""
