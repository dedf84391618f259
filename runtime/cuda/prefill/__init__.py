"""Forward passes of many tokens: experts stream into slots while others compute.

streaming_pool   slots, and the copies that fill them
grouped_experts  a layer's experts for many tokens
"""
