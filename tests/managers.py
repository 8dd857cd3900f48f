"""Runs that save with a manager, and what they leave in its directory."""

import os

import ckpt_jax as ckpt


def numbers_in(directory, name="ckpt"):
    return sorted(
        int(each.rpartition("-")[2])
        for each in os.listdir(directory)
        if each.startswith(f"{name}-")
    )


def run_in(directory, **arguments):
    return ckpt.CheckpointManager(ckpt.Checkpoint(step=0), directory, **arguments)


def save(manager, *steps, **arguments):
    for step in steps:
        manager.checkpoint.step = step
        path = manager.save(step, **arguments)
    return path
