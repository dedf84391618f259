"""The machine, the link, model shapes and tables: shared by all benchmarks."""
