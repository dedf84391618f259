"""Memory on both ends of the link.

pinned_experts  every expert in pinned host memory
layer_reader    layers read by threads, as they are stored
layer_packer    layers that the GPU packs, while threads read ahead
expert_block    one expert as one piece of memory
unpacking       stored blocks made plain
pinned          pinned memory
shared_memory   memory that several processes pin
host_dense      embedding and head in host memory, for tiny budgets
kernel_layout   which experts the kernels can run
"""
