"""The parts of the serving loop.

arrivals     requests taken in, and wishes to end them
in_flight    the sequences that wait and run, and their ends
admission    who gets a row, who gives one back, who runs in a step
choices      several choices of one prompt, which runs once
room         pages of rows: who fits, who is parked where none is left
row_pages    pages of those that have a row, on the device or in host memory
rows         rows of the key/value cache: taken, parked, reused
forecasting  the predictor beside the steps; serving goes on without one that fails
streams      a request's tokens and result, from the thread of the steps to a coroutine
failures     errors as a line of text, and whose fault they are
"""
