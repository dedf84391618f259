"""The GPU engine: decode steps as CUDA graphs over slots on the device, prefill over streams.

Only `runtime.load` imports it, and only for a CUDA device: Triton is not needed elsewhere.

    gpu         what `Engine` calls; budget: what fits on the device
    path        generate: which generations run captured
    loop        generate's decode loop over captured steps
    generation  sequences that go on together: predict, schedule, run, account
    rows        steps over any rows of the key/value cache: what `engine.serve` decodes with
    decoder     what both share: books, captured steps, their outcome
    step        one decode step of the model as one CUDA graph
    kv          the key/value cache that all captured steps share
    experts     one layer's experts call, in kernels
    books       the cache's books as device tensors
    oracle      the predictor, beside the steps
    trial       whether prefetching pays here
    streamed    slots, and experts streamed into them: prefill and whatever is not captured
    grouped     a layer's experts for many tokens
    host        the host tier: every expert in pinned memory
    record      an expert as one piece of memory, as slots and host tier store it
    packing     12 bits for a bfloat16 weight, lossless
    pinned      pinned memory
    dense       embedding and head in host memory, for tiny budgets
    layout      which experts the kernels can run
    op          the experts call as one operator, for torch.compile
    *_kernel(s) the Triton kernels
"""
