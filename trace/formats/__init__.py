"""Routing traces of other programs read in, and traces written as tables.

vllm, sglang, megatron, llama_cpp, npy   one format each: `read(path, topology, options)`
document       the contract of a format, and the checks that all share
arrays, passes arrays and JSON records; forward passes put together as sequences
importing, exporting   the commands `python -m trace.formats import` and `... export`
settings       their options
"""
