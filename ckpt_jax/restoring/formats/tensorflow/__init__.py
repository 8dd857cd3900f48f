"""Checkpoints of TensorFlow, in and out, without TensorFlow.

varints, checksums   the small parts of the format
table                sorted tables, the format of an index file
strings              byte strings in a data file
bundle               what an index says: tensors, and the bytes that hold them
object_graph         TensorFlow's object graph as one of ours
opening              all of it as a `readers.Reader`
writing_tensorflow   the way back, for `ckpt.export`
"""

from __future__ import annotations

from ckpt_jax.readers import Format
from ckpt_jax.restoring.formats.tensorflow.opening import open_checkpoint, recognises, steps

TENSORFLOW = Format("tensorflow", recognises, open_checkpoint, steps)

__all__ = ["TENSORFLOW"]
