"""Iterators of tf.data: their state is what TensorFlow's own checkpoints hold of them.

Such an iterator (`iter(dataset)` or `dataset.as_numpy_iterator()`) is a trackable of TensorFlow: it
gives tensors, and takes them back. These tensors hold opaque objects (variants): the positions of
all steps of the pipeline, and the elements in their buffers. TensorFlow writes them as bytes.

TensorFlow is not imported here: if there is an iterator of it, the program has done that.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np

_METHODS = ("__next__", "_serialize_to_tensors", "_restore_from_tensors")
_GROUP = 64  # variants that are written together; TensorFlow allows a group 2 GiB
_BYTES, _ENDS = "bytes", "ends"


def is_tf_iterator(kind: type) -> bool:
    """Whether objects of a type are iterators of tf.data."""
    return all(callable(getattr(kind, name, None)) for name in _METHODS)


def state_of_iterator(iterator: Any) -> dict[str, dict[str, np.ndarray]]:
    """The state of an iterator: for each of its tensors, the bytes and where the groups end.

    Raises:
      ValueError: the pipeline has a state that tf.data cannot save.
    """
    tf: Any = sys.modules["tensorflow"]
    with tf.device("CPU:0"):
        try:
            tensors = iterator._serialize_to_tensors()
        except tf.errors.FailedPreconditionError as error:
            raise ValueError(
                f"tf.data cannot save this pipeline: {_first_line(error)}. Take that step out of "
                "the pipeline, or say that its state may be lost: set "
                "tf.data.Options().experimental_external_state_policy to "
                "tf.data.experimental.ExternalStatePolicy.WARN, for dataset.with_options"
            ) from error
        return {name: _written(tf, tensor) for name, tensor in tensors.items()}


def give_iterator_state(iterator: Any, state: Any) -> None:
    """Gives an iterator of an equal pipeline the state of another one.

    Raises:
      ValueError: it is no state of an iterator of tf.data, or of another pipeline.
    """
    tf: Any = sys.modules["tensorflow"]
    try:
        parts = {name: (part[_BYTES], part[_ENDS]) for name, part in state.items()}
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError(
            f"expected the state of an iterator of tf.data, got a {type(state).__qualname__} that "
            "is none"
        ) from None
    with tf.device("CPU:0"):
        try:
            tensors = {name: _parsed(tf, *part) for name, part in parts.items()}
            iterator._restore_from_tensors(tensors)
        except (tf.errors.OpError, KeyError) as error:
            raise ValueError(
                f"tf.data cannot restore this pipeline: {_first_line(error)}. Build the dataset as "
                "the program did that saved the checkpoint"
            ) from error


def _written(tf: Any, variants: Any) -> dict[str, np.ndarray]:
    starts = range(0, len(variants), _GROUP)
    groups = [tf.io.serialize_tensor(variants[at : at + _GROUP]).numpy() for at in starts]
    ends = np.cumsum([len(group) for group in groups], dtype=np.int64)
    return {_BYTES: np.frombuffer(b"".join(groups), np.uint8), _ENDS: ends}


def _parsed(tf: Any, data: np.ndarray, ends: np.ndarray) -> Any:
    groups = [tf.io.parse_tensor(g.tobytes(), tf.variant) for g in np.split(data, ends[:-1])]
    return tf.stack([variant for group in groups for variant in tf.unstack(group)])


def _first_line(error: Exception) -> str:
    """What TensorFlow says, without the name of the function that says it."""
    lines = str(getattr(error, "message", error)).splitlines() or [""]
    return re.sub(r"^\{\{.*?\}\} | \[Op:.*", "", lines[0]).rstrip(". ")
