"""Live prediction: the route predictor run beside the model, and the record of true routes.

predictor_file        an exported predictor, checked
forecaster            prediction for one batch that starts and ends together
sequence_forecaster   prediction for sequences that come and go
session_memory        what followed earlier tokens alike, for both
signature             a short vector by which the session memory tells what is alike
layer_map             which of the model's layers the predictor speaks of
route_log             the routes of what ran, kept as a trace
"""
