"""The choice of who is admitted and who decodes.

scheduler  bounds on waiting and priorities around an ordering
ordering   first come, first served; by true domain
turns      groups of requests that share one turn
predicted  by predicted routes; bursts: requests that arrive together
paper      the paper's scheduler
payoff     when ordering by prediction rests
"""
