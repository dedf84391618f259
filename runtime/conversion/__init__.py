"""The conversion of a bfloat16 model to a lossy encoding, and the measure of its loss.

settings       what users choose
texts          texts in windows of tokens
activations    inputs of the experts, recorded while the original runs
encoded_store  the checkpoint's experts, encoded as they are read
quality        the converted model beside the original on the same text
card           conversion.json and the model card
convert        all of it in order
"""
