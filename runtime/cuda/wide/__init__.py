"""Passes of so many tokens that every expert is used: each crosses the link once for all of them.

schedule       which experts stay in slots, and the order in which the others stream past them
regime         when such passes are expected
expert_stream  the copies of a schedule, beside the products
wide_experts   a layer's products, group by group as they arrive
wide_pass      which passes are streamed
wide_call      the same as the experts calls of captured steps
wide_rows      captured steps of many rows
"""
