"""The cost of recording routes."""
