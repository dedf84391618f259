"""Pages: a row's keys and values in pieces of one length, anywhere in memory.

places      where the positions of rows are: in rows of one piece, or in pages
page_table  which pages each row has; taken as sequences grow, given back when they end
"""
