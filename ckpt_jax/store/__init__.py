"""Bytes on disk: staging, shards, their index, reading and merging, and the state file.

Nothing here knows of JAX or of the objects that values belong to.
"""
