"""Benchmarks of decoding, prefill, serving, loading, kernels, cache policies and tracing."""
