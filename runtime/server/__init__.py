"""An OpenAI-compatible server over one offloaded model: `python -m runtime.server`.

    settings      the command's options
    app           the routes; listener: where they are listened for, and how that ends
    handlers      requests for text; tokenization: for tokens
    runs          the choices of an answer while they are generated; events: as they come
    protocol/     requests and answers as OpenAI writes them
    live/         the events about the steps, and the page that shows them
    auth          the bearer token and the limits on a body; json_body: the JSON in it
    errors        answers other than 200
    metrics       counts for Prometheus
    replicas      the same on a Ray cluster

Needs the extra `serve`; replicas need `ray`.
"""
