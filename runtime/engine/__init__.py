"""The engine: attached to an unmodified model, it runs the experts out of slots.

engine       attached to the model: what users call
steps        forward passes as steps, and the experts calls within them
turns        threads wait for each other
experts      an experts call out of slots, exact whatever is resident
gradients    gradients through experts calls, whose experts are constants
pool         slots and the loads that fill them
step_inputs  what a forward pass is about to run
observer     the true routes of each step, for the predictor and the route log
next_tokens  the likeliest next tokens of a step, and its logits
attachment   changes to a model, each with its way back
guards/      changes, copies and saves by others: exact or refused
"""
