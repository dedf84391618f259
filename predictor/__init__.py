"""The route predictor: learns from traces where a mixture-of-experts model routes its tokens.

train        train on trace directories: `python -m predictor.train fit`
export       write the ONNX file that the runtime reads
evaluate     score exported predictors beside baselines
layer_ahead  add the predictions of look-ahead networks to traces
networks/    the predictors' networks
training/    data, loss, metrics, checkpoints
file/        the ONNX file: exported, checked against torch, run over documents
evaluation/  baselines, scores, tables
lookahead/   look-ahead networks
causal, t5   class paths of older configuration files
"""
