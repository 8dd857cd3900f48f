"""Leaves of a program as arrays of bytes: what each kind is, and how it moves between devices
and host memory.
"""
