"""Recorded texts and routes, replayed in place of a random model's own."""
