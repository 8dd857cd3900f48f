"""The object graph as data: labels, nodes, the specs of values, and how a graph is encoded.

Nothing here knows of arrays, devices or files.
"""
