"""Files of Keras, and other HDF5 files.

`hdf5` finds the arrays in an HDF5 file, `opening` knows what Keras keeps in one, and around it.
"""

from ckpt_jax.restoring.formats.keras.opening import KERAS

__all__ = ["KERAS"]
