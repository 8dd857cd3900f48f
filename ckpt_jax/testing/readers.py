"""A conformance suite for readers of checkpoints, whatever their format.

The author of a format subclasses `ReaderTests`, says how to write a checkpoint of some arrays, and
pytest runs every promise of `ckpt_jax.readers.Reader` against the reader that opens it:

    from ckpt_jax.testing import ReaderTests

    class TestMine(ReaderTests):
        def write(self, path, arrays):
            my_package.save(path, arrays)

        def open(self, path):
            return my_package.FORMAT.open(path)

This module needs pytest, which the package itself does not.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest

from ckpt_jax.errors import CheckpointError
from ckpt_jax.graph.boxes import Box, slices, whole
from ckpt_jax.readers import Reader

_INFLIGHT_NBYTES = 1 << 16


class ReaderTests:
    """The tests that the reader of every format has to pass.

    Subclass it, with a name that pytest collects, and override `write` and `open`.

    Attributes:
      holds_empty_arrays: whether the format has arrays without elements.
    """

    holds_empty_arrays = True

    # --- to override -------------------------------------------------------------------

    def write(self, path: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a checkpoint of arrays, by name; the names have no separators.

        Args:
          path: where nothing is yet.
          arrays: of float32, int32 and uint8, and of rank 0 to 3.
        """
        raise NotImplementedError

    def open(self, path: str) -> Reader:
        """Opens what `write` wrote."""
        raise NotImplementedError

    # --- the tests ---------------------------------------------------------------------

    def test_the_index_describes_every_value(self, tmp_path: pathlib.Path) -> None:
        reader, arrays, keys = self._opened(tmp_path)
        index = reader.index
        assert list(index.keys) == sorted(index.keys)
        for name, array in arrays.items():
            layout = index.layout_of(keys[name])
            assert (layout.dtype, tuple(layout.shape)) == (array.dtype.name, array.shape)
            assert not layout.is_bytes and keys[name] in index
            assert index.nbytes(keys[name]) == array.nbytes
        assert "nothing of that name" not in index

    def test_the_graph_and_the_index_agree(self, tmp_path: pathlib.Path) -> None:
        reader, arrays, _ = self._opened(tmp_path)
        graph = reader.graph()
        assert graph is not None
        found = {
            graph.value_path(node, attribute.name): attribute
            for node, attribute in graph.attributes()
        }
        assert len(found) >= len(arrays)
        for attribute in found.values():
            layout = reader.index.layout_of(attribute.key)
            assert (layout.dtype, layout.shape) == (attribute.spec.dtype, attribute.spec.shape)

    def test_any_boxes_are_read(self, tmp_path: pathlib.Path) -> None:
        reader, arrays, keys = self._opened(tmp_path)
        requests = [(keys[name], _boxes(array.shape)) for name, array in arrays.items()]
        found = dict(reader.read(requests, max_inflight_bytes=_INFLIGHT_NBYTES))
        assert sorted(found) == [*range(len(requests))]
        for number, (name, array) in enumerate(arrays.items()):
            boxes = requests[number][1]
            assert len(found[number]) == len(boxes)
            for box, part in zip(boxes, found[number], strict=True):
                np.testing.assert_array_equal(part, array[slices(box)], err_msg=name)
                assert part.dtype == array.dtype and part.flags.c_contiguous
                assert part.flags.writeable
        assert reader.bytes_read > 0

    def test_no_two_arrays_share_memory(self, tmp_path: pathlib.Path) -> None:
        reader, arrays, keys = self._opened(tmp_path)
        name = next(name for name, array in arrays.items() if array.size > 1)
        box = whole(arrays[name].shape)
        request = (keys[name], [box, box])
        results = reader.read([request, request], max_inflight_bytes=_INFLIGHT_NBYTES)
        parts = [part for _, found in results for part in found]
        for a, b in pairwise(parts):
            assert not np.shares_memory(a, b)

    def test_what_cannot_be_read_is_an_error(self, tmp_path: pathlib.Path) -> None:
        reader, arrays, keys = self._opened(tmp_path)
        name = next(name for name, array in arrays.items() if array.ndim == 2)
        beyond = tuple([(0, n + 1) for n in arrays[name].shape])
        with pytest.raises(KeyError):
            list(reader.read([("nothing of that name", [()])], max_inflight_bytes=1))
        with pytest.raises(ValueError):
            list(reader.read([(keys[name], [beyond])], max_inflight_bytes=1))

    def test_an_iterator_may_be_left_early(self, tmp_path: pathlib.Path) -> None:
        reader, arrays, keys = self._opened(tmp_path)
        requests = [(keys[name], [whole(array.shape)]) for name, array in arrays.items()]
        results = reader.read(requests, max_inflight_bytes=_INFLIGHT_NBYTES)
        next(results)
        del results
        assert len([*reader.read(requests, max_inflight_bytes=1)]) == len(requests)

    def test_a_closed_reader_refuses_to_read(self, tmp_path: pathlib.Path) -> None:
        reader, arrays, keys = self._opened(tmp_path)
        name = next(iter(arrays))
        reader.close()
        with pytest.raises(RuntimeError):
            list(reader.read([(keys[name], [whole(arrays[name].shape)])], max_inflight_bytes=1))

    def test_the_identity_changes_if_another_takes_the_place(self, tmp_path: pathlib.Path) -> None:
        reader, arrays, _ = self._opened(tmp_path)
        before = reader.identity()
        assert before is not None and before == reader.identity()
        reader.check_files()
        self.write(str(tmp_path / "other"), {name: array * 0 for name, array in arrays.items()})
        for name in os.listdir(tmp_path):
            if name.startswith("other"):
                _replace(tmp_path / name, tmp_path / name.replace("other", "written", 1))
        assert reader.identity() != before

    def test_what_is_gone_has_no_identity(self, tmp_path: pathlib.Path) -> None:
        reader, _, _ = self._opened(tmp_path)
        for name in os.listdir(tmp_path):
            _remove(tmp_path / name)
        assert reader.identity() is None

    def test_a_file_that_is_cut_off_is_found(self, tmp_path: pathlib.Path) -> None:
        self._opened(tmp_path)[0].close()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        with pytest.raises(CheckpointError):
            reader = self.open(str(tmp_path / "written"))
            reader.check_files()

    def _opened(
        self, tmp_path: pathlib.Path
    ) -> tuple[Reader, dict[str, np.ndarray], dict[str, str]]:
        """A reader, the arrays, and their keys by name."""
        arrays = _arrays()
        if not self.holds_empty_arrays:
            arrays = {name: array for name, array in arrays.items() if array.size}
        path = str(tmp_path / "written")
        self.write(path, arrays)
        reader = self.open(path)
        keys: dict[str, str] = {}
        graph = reader.graph()
        assert graph is not None
        by_name = {
            graph.value_path(node, attribute.name): attribute.key
            for node, attribute in graph.attributes()
        }
        for number, name in enumerate(sorted(arrays)):
            # A format without names has them in the order in which JAX flattens a dict.
            keys[name] = by_name.get(name) or by_name[str(number)]
        return reader, arrays, keys


def _arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "scalar": np.asarray(random.integers(99), np.int32),
        "vector": random.integers(0, 255, 77).astype(np.uint8),
        "matrix": random.standard_normal((64, 33)).astype(np.float32),
        "cube": random.integers(-99, 99, (5, 6, 7)).astype(np.int32),
        "nothing": np.zeros((0, 3), np.float32),
    }


def _boxes(shape: tuple[int, ...]) -> list[Box]:
    """The whole, its halves along each axis, and a part in the middle."""
    boxes = [whole(shape), tuple([(n // 3, n - n // 4) for n in shape])]
    for axis, n in enumerate(shape):
        for bounds in ((0, n // 2), (n // 2, n)):
            boxes.append((*whole(shape[:axis]), bounds, *whole(shape[axis + 1 :])))
    return boxes


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _replace(source: pathlib.Path, target: pathlib.Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)
