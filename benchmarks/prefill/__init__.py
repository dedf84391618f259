"""Time to the first token of an offloaded model, over prompt lengths."""
