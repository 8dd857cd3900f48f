"""Checkpoints of other libraries in object stores: they are read as those on a disk are."""

import functools
from pathlib import Path

import numpy as np
import pytest
from foreign import FIXTURES

import ckpt_jax as ckpt
from ckpt_jax.restoring.formats import format_of
from ckpt_jax.store import objects

SUFFIX = ".index"


def _fixtures():
    """The path of each checkpoint of another library that there is, relative to `FIXTURES`."""
    todo, found = sorted(FIXTURES.iterdir()), []
    for each in todo:  # grows while it is walked
        path = each.with_suffix("") if each.suffix == SUFFIX else each
        if format_of(str(path)) is not None and not each.name.count(".data-"):
            found.append(str(path.relative_to(FIXTURES)))
        elif each.is_dir():
            todo += sorted(each.iterdir())
    return sorted(found)


def upload(source, url):
    """Copies a file or the files in a directory, and those whose names begin like it."""
    source = Path(source)
    for each in [source, *source.parent.glob(f"{source.name}.*")]:
        for file in [each, *each.rglob("*")]:
            if file.is_file():
                objects.write(url + str(file).removeprefix(str(source)), file.read_bytes())
    return url


@pytest.fixture
def uploaded(memory):
    return functools.partial(upload, url=f"{memory.url}/a")


def contents(path):
    """All that a checkpoint says of itself, and all values that can be read; or why it cannot be
    opened."""
    try:
        with ckpt.load_checkpoint(path) as reader:
            refused = reader.refusals()
            keys = [key for key in reader.get_variable_to_shape_map() if key not in refused]
            return reader.object_graph, reader.unchecked, refused, reader.read(dict.fromkeys(keys))
    except ckpt.CheckpointError as error:
        return type(error), str(error).replace(str(path), "PATH")


def assert_alike(found, expected):
    assert found[:-1] == expected[:-1]
    if not isinstance(expected[-1], dict):
        assert found == expected
        return
    assert found[-1].keys() == expected[-1].keys()
    for key, value in expected[-1].items():
        assert type(found[-1][key]) is type(value)
        np.testing.assert_array_equal(found[-1][key], value, err_msg=key)


@pytest.mark.parametrize("name", _fixtures())
def test_every_checkpoint_reads_as_on_a_disk(uploaded, name):
    local = FIXTURES / name
    url = uploaded(local)
    assert_alike(contents(url), contents(local))
    here, there = ckpt.verify(local), ckpt.verify(url)
    assert str(there).replace(url, str(local)) == str(here)
