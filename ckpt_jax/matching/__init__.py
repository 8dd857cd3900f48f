"""Live objects and saved graphs, side by side; pure, but for `assign`.

trace   from live objects to a graph
match   a saved graph with a live one, along equal labels
plan    what a match means for values: what to read, and every problem
assign  values into the live objects
"""
