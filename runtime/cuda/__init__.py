"""The GPU engine: decode steps as CUDA graphs over slots on the device, prefill over streams.

Only `runtime.load` imports it, and only for a CUDA device: Triton is not needed elsewhere.

    host        the host tier: every expert in pinned memory
    layout      which experts the kernels can run, and how
    books       the cache's books as device tensors
    plan_kernel, expert_kernels, prefetch_kernels   what runs in a step
    experts     one layer's experts call, in kernels
    kv          the key/value cache that all captured steps share
    step        one decode step of the model, captured
    oracle      the predictor, beside the steps
    loop        generate's decode loop over captured steps
    streamed    prefill and everything else: experts streamed into slots
    path        all of it for one model
"""
