"""Many requests at once: continuous batching over one offloaded model.

request      what is asked, what comes back
settings     how requests are served together
feed         engine.serve: requests in, results out; front: the same for asyncio
loop         one step after the other
job          a request in flight; sampler, text: its next token, its text
kv           the key/value cache in rows
outlook      prediction for each sequence
scheduler    who is admitted, who decodes: bounds and priorities around an ordering
ordering     fifo and domain-oracle; predicted, paper
payoff       when ordering by prediction rests
"""
