"""Cache policies and predictors compared on recorded traces, without a model.

settings       the options of `python -m runtime.simulate`
trace_steps    recorded documents as decode steps
replay         policies over recorded steps; hit_rates: their table, JSON and plot
gap            the best free rule, and the share of the gap to Belady that is closed
link_model     the time that decoding would take on a modelled link
baselines      predictors that need no training by gradient
calibration, lookahead_contenders   look-ahead from a layer's router input
comparison     a contender, and its result at one cache size
contenders     all contenders of `--all`; report: their tables
"""
