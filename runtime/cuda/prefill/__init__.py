"""Forward passes of many tokens: experts stream into slots while others compute.

slots            device memory of expert blocks
streaming_pool   what is in the slots, and the copies that fill them
look_ahead       what the next layer will want
tiling           tiles of the products, and their tables
products         launches of the products
telling          small numbers between host and device
grouped_experts  a layer's experts for many tokens
"""
