"""Triton kernels, and the operators that torch.compile sees in their place.

plan        hits, victims and loads of one layer's call, decided on the device
experts     gate, up and down projections out of slots; packed, unpacked: reading weights
transfer    pinned memory to slots; prefetch: which expert to fetch ahead
coded       matrices in codes, decoded in registers
unpack      packed expert blocks, and those in codes, to plain ones
grouped     products of many tokens, sorted by expert
attention   single tokens over long rows of a key/value cache; new_tokens: their own, written there
custom_ops  operators for torch.compile
"""
