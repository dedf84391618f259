"""The experts of a checkpoint, a prepared model or a module in memory, and the model without them.

source            a model built without its experts, its MoE layers, and the store of its experts
directory         a model directory, local or from the Hub; the model on the meta device
dense/            the model built without its experts
encodings/        experts kept in codes of 4 or 8 bits
quantised/        quantised checkpoints, seen as their unquantised twins
files             safetensors files, watched for changes
mapping, conversion   the checkpoint tensors that make up an expert
repository/       files on the Hub, fetched when they are needed; directories without a model
store             the contract of all stores, and the store of a module's own tensors
checkpoint_store  experts read from where they lie in the files
memory_store      all experts read once and held in memory
packed/           experts in 12 bits a weight, as a GPU keeps them
prepared/         experts as contiguous, checksummed blocks, and their writer (`runtime.prepare`)
encodings/        experts kept in codes of 4 or 8 bits
arena             slots for experts of one shape
"""
