"""The command `expertflow adapt`: a predictor trained further, kept if it became better.

hit_rates  the cache with and without it, on documents that neither saw
report     tables and JSON
"""
