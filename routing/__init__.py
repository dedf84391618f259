"""The code that the three stages share; none of them imports another.

topology         a model's MoE layers and fingerprints; inspect_model: those of a live model
layers           the MoE layers of a model, and the routes of their experts calls
pretrained       configurations, classes and tokenizers; a model's own code is never run
containers       the layouts of experts and their parameters
blocks           MoE blocks, whose routers can be run early
shards, writer   the trace format, read and written; lookahead: experts of coming layers in it
predictor_file/  the predictor's ONNX file: format, reader, driver
cli              command lines from settings dataclasses; names: short names of files
process/         how commands end; one writer of an output at a time
cluster          workers on Ray (the extra `ray`)
"""
