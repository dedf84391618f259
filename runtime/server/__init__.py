"""An OpenAI-compatible server over one offloaded model: `python -m runtime.server`.

    settings   the command's options
    app        the routes
    replicas   the same on a Ray cluster
    openai_schema  requests and answers as OpenAI writes them
    logprobs   log-probabilities likewise
    auth       the bearer token and the limit on a body
    metrics    counts for Prometheus

Needs the extra `serve`; replicas need `ray`.
"""
