"""Decode steps as CUDA graphs.

generate          what stands in for `model.generate`; generate_loop: its loop over steps
batch_decoder     sequences that are generated together
row_decoder       steps over any rows of the key/value cache: what `engine.serve` decodes with
decoder           running captured steps, for both
graph_step        one decode step of the model as one CUDA graph
experts           one layer's experts call, in kernels
device_cache      the expert cache's tables on the device
predictor_thread  the predictor beside the steps
policy_driver     the one owner of the policy while steps run captured
captured_model    the model as captured steps run it
"""
