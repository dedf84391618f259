"""Sampling: the choice of one request's next token, and the log-probabilities that go with it.

sampler     the choice; processors: the rules that transformers has none of
grammar     structured output: JSON that fits a schema
logprobs    log-probabilities of generated tokens and of prompts
ends        tokens and texts that end a request
"""
