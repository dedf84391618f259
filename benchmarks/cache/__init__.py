"""Cache policies: live, with the truth for predictions, and their cost on the host."""
