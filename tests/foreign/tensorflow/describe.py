"""Writes `expected.json`: what TensorFlow itself reads from the checkpoints in this folder.

    python describe.py     needs tensorflow

By checkpoint and key: dtype, shape, and the SHA-256 of the bytes, which is None for arrays of
strings. None instead of all three stands for an error.
"""

import hashlib
import json
import os
import pathlib

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

HERE = pathlib.Path(__file__).parent


def prefixes():
    """The checkpoints in this folder, without those of optimizers and one of very many values."""
    files = sorted(HERE.rglob("*.index"))
    names = [str(file.relative_to(HERE)).removesuffix(".index") for file in files]
    return [name for name in names if not name.startswith(("optimizers/", "blocks"))]


def described(prefix):
    reader = tf.train.load_checkpoint(str(HERE / prefix))
    found = {}
    for key in sorted(reader.get_variable_to_shape_map()):
        try:
            value = reader.get_tensor(key)
        except Exception:
            found[key] = None
            continue
        if isinstance(value, bytes):
            found[key] = ["bytes", [], hashlib.sha256(value).hexdigest()]
            continue
        array = np.asarray(value)
        found[key] = [array.dtype.name, list(array.shape), _digest(array)]
    return found


def _digest(array):
    is_readable = array.dtype != object
    return hashlib.sha256(array.tobytes()).hexdigest() if is_readable else None


def main():
    expected = {prefix: described(prefix) for prefix in prefixes()}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1))


if __name__ == "__main__":
    main()
