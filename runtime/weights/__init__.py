"""Where experts come from: a checkpoint, a prepared model or a module in memory.

source            a model without its experts, its layers, and the store that holds them
skeleton          building the model without its experts
files, mapping, conversion   experts out of a checkpoint's tensors
store             the contract of a store; a module's own tensors as one
checkpoint_store  experts read from where they lie in the files
memory_store      all experts read once, kept in memory
prepared_store    experts as contiguous, checksummed blocks (`runtime.prepare`)
arena             slots of one expert shape
"""
