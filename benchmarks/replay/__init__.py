"""Texts and routes, recorded or drawn, replayed in place of a random model's own."""
