"""The model's own operations fused by torch.compile, at once or beside plain steps.

compiled_forward  the model's forward, compiled for one kind and size of captured step
artefacts         the compiler's artefacts on disk: a later load finds its steps there
blueprint         model and step without the numbers: enough for a process of the compiler's own
background        that process, which fills the artefacts while plain steps answer
step_forwards     the forward that each captured step runs; the switch from plain to compiled
"""
