"""Checkpoints that other libraries wrote, and files made hostile."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import ckpt_jax as ckpt

FIXTURES = Path(__file__).parent / "foreign"

_NUMBERS = [
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"999999999999999999",
    b"-1",
    b"[[[[",
]


def mutations(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The same bytes with random damage: changed, left out, repeated, cut off, huge numbers."""
    choice = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(choice.randint(1, 4)):
            at = choice.randrange(len(changed))
            match choice.randrange(5):
                case 0:
                    changed[at] = choice.randrange(256)
                case 1:
                    number = choice.choice(_NUMBERS)
                    changed[at : at + len(number)] = number
                case 2:
                    del changed[at : at + choice.randint(1, 16)]
                case 3:
                    changed[at:at] = changed[at : at + choice.randint(1, 64)]
                case _:
                    del changed[max(1, at) :]
            if not changed:
                changed = bytearray(b"\0")
        yield bytes(changed)


def outcome(path: Path | str, limit_nbytes: int = 64 << 20) -> str:
    """ "fine", "refused" or "none": what became of loading a file that may be damaged.

    Any other error than ours, and taking more memory than the limit, is an AssertionError.
    """
    tracemalloc.start()
    try:
        with ckpt.load_checkpoint(path) as reader:
            reader.paths()
            refused = reader.refusals()
            keys = [key for key in reader.get_variable_to_shape_map() if key not in refused]
            for value in reader.read(dict.fromkeys(keys)).values():
                assert not isinstance(value, np.ndarray) or value.dtype != object
        found = "fine"
    except ckpt.CheckpointNotFoundError:
        found = "none"
    except ckpt.CheckpointError:
        found = "refused"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < limit_nbytes
    return found


def check_hostile(path: Path, data: bytes, count: int, seed: int = 0) -> dict[str, int]:
    """Writes damaged versions of a file, and counts what becomes of loading them."""
    found = {"fine": 0, "refused": 0, "none": 0}
    for changed in mutations(data, count, seed):
        path.write_bytes(changed)
        found[outcome(path)] += 1
    return found
