"""Loading time and memory of a checkpoint that should not fit."""
