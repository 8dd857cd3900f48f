"""Checkpoints whose values cannot be read."""

from pathlib import Path

import numpy as np
import pytest

import ckpt_jax as ckpt

FILLER = np.zeros(1000)


def save_unreadable(path, tree):
    """Saves a tree and inverts bits of every byte of its values: reading any of them fails.

    The filler keeps the values from being so small that they lie among the metadata.
    """
    path = ckpt.save(path, {**tree, "filler": FILLER})
    damage_values(path)
    return path


def damage_values(path):
    files = [file for file in Path(path).glob("shards/*/c/*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(bytes(b ^ 0x5A for b in file.read_bytes()))
    with pytest.raises(ckpt.CorruptCheckpointError):
        ckpt.load(path)
