"""Errors as values of the program that catches them."""

import pickle
from pathlib import Path

import jax.numpy as jnp
import pytest

import ckpt_jax as ckpt


def test_a_mismatch_comes_whole_from_another_process(tmp_path: Path):
    path = ckpt.save(tmp_path / "a", {"w": jnp.ones(2)})
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, {"w": jnp.ones(3)})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ckpt.RestoreMismatchError
    assert (str(copy), copy.report) == (str(caught.value), caught.value.report)
