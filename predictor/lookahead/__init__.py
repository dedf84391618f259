"""Look-ahead networks: small networks from a router's input to the experts of coming layers.

settings       the settings of `python -m predictor.layer_ahead`
networks       the networks and their loss
router_inputs  router inputs of a running model, batch by batch
training       training the networks on the text of traces
annotation     copying traces with the look-ahead in them
"""
