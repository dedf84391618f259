"""ExpertFlow and other systems, each set up on the same model and timed on the same text."""
