"""The verbs: `Checkpoint`, `save`, `restore`, `load` and what looks into a checkpoint.

They take the surroundings from the running process, and hand them to the rooms below.
"""
