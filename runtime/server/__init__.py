"""An OpenAI-compatible server over one offloaded model: `python -m runtime.server`.

    settings   what the command line offers
    app        the routes
    replicas   the same on a Ray cluster
    wire       requests and answers as OpenAI writes them
    logprobs   log-probabilities likewise
    guard      the bearer token and the limit on a body
    metrics    what Prometheus reads

Needs the extra `serve`; replicas need `ray`.
"""
