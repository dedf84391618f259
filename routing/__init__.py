"""The code that the three stages share; none of them imports another.

topology         a model's MoE layers and fingerprints; inspect_model: read off a model
layers           finding the MoE layers of a model, and reading routes off an experts call
containers       the layouts of experts: whose parameters are whose
blocks           MoE blocks up to their experts call: routers asked early
shards, writer   the trace format, read and written; lookahead: its view of coming layers
predictor_file/  the predictor's ONNX file: format, reader, driver
cli              command lines from settings dataclasses; names: files in tables
cluster          workers on Ray (the extra `ray`)
"""
