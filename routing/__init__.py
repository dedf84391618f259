"""What the three stages share: topology, the MoE layers of a model, and the trace format."""
