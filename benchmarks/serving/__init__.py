"""Many requests at once, under several schedulers."""
