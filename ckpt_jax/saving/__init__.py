"""The way out: from live objects to a committed checkpoint.

run         one save from the call to the record, here or in the background
pipeline    its stages: trace, snapshot, write, commit, finish
snapshot    values in host memory, and what this process writes of them (`spread`)
write       shards, as the sharding policy says
background  one piece of work at a time on a thread of its own
"""
