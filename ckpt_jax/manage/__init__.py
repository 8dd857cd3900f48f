"""Many checkpoints of one directory: which there are, which stay, and a last one at preemption."""
