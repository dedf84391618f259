"""Inputs of requests, brought into one form or refused by name.

fields     numbers, flags and texts of a request's fields
prompt     a prompt as text or token ids
items      requests as callers give them
tokenizer  the model's own, where callers give none
"""
