"""A model's files: where they are, and fetching those that are needed from the Hub.

hub       a model on the Hub: its small files first, its weights when they are wanted
refusals  directories that hold no model which can be loaded, and the remedy
"""
