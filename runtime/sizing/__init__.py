"""What fits: memory budgets in slots, and the bandwidth of the link."""
