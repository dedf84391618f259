"""Matrix products of many tokens with many experts, out of slots: one launch for all.

sorting    pairs (token, expert) sorted by expert, and the tiles of their products
columns    orders of columns, as weights are decoded
weights    tiles of weights, decoded in registers from whatever a block stores
patches    what packed weights leave out
products   the two products, and the sum over a token's experts

A tile is a stretch of one expert's rows. A launch runs the tiles of a group of experts:

    tiles  [*, 3] int32    first row, number of rows, slot
    starts [G + 1] int32   the first tile of each group, and the end

So a group can be whatever has arrived, in any slots, and a row's result depends on neither.
"""
