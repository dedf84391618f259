"""Memory on both ends of the link.

pinned_experts  every expert in pinned host memory
coded_layers    experts in codes, read by threads
expert_block    one expert as one piece of memory
packing         12 bits for a bfloat16 weight, lossless
pinned          pinned memory
host_dense      embedding and head in host memory, for tiny budgets
kernel_layout   which experts the kernels can run
"""
