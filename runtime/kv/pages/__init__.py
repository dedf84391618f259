"""Pages: a row's keys and values in pieces of one length, anywhere in memory.

places      places of rows' positions in memory: in rows of one piece, or in pages
page_table  which pages each row has; taken as sequences grow, given back when they end
spill       copies of pages to host memory and back
"""
