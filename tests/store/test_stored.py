"""Arrays that lie as plain bytes in files: pieces, threads, checksums, damage."""

import itertools
import math
import os
import threading
import zlib

import numpy as np
import pytest
from descriptors import open_files
from hypothesis import given
from hypothesis import strategies as st

import ckpt_jax as ckpt
from ckpt_jax.graph.boxes import shape_of, slices, whole
from ckpt_jax.graph.dtypes import dtype_name
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.store import pieces
from ckpt_jax.store import stored as stored_values
from ckpt_jax.store.extents import Checksum, Extent, Stored, c_strides
from ckpt_jax.store.stored import ExtentsReader

DTYPES = [np.dtype(name) for name in ("int8", "uint16", "float32", "complex128")]


def array_spec(array) -> LeafSpec:
    return LeafSpec("numpy", dtype_name(array.dtype), array.shape)


def stored_as(path, base: np.ndarray, view: np.ndarray, **more) -> Stored:
    """A view of an array that is written to a file as a whole."""
    path.write_bytes(b"head" + base.tobytes())
    address = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    strides = tuple(stride // base.itemsize for stride in view.strides)
    return Stored(
        array_spec(view), (Extent(whole(view.shape), str(path), 4 + address, strides),), **more
    )


def read(reader, key, *boxes, **options):
    options = {"max_inflight_bytes": 1 << 20, **options}
    ((_, parts),) = reader.read([(key, boxes)], **options)
    return parts


@st.composite
def views(draw):
    """An array and a view of it: any axes, sliced with steps, in any order, or repeated."""
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple))
    dtype = draw(st.sampled_from(DTYPES))
    base = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    view = base
    for axis, n in enumerate(shape):
        start, step = draw(st.integers(0, n - 1)), draw(st.integers(1, 3))
        view = view[(*[slice(None)] * axis, slice(start, None, step))]
    view = view.transpose(draw(st.permutations(range(view.ndim))))
    if draw(st.booleans()):
        view = np.broadcast_to(view, (draw(st.integers(1, 3)), *view.shape))
    return base, view


@st.composite
def boxes_in(draw, shape):
    def bounds(n):
        return st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted).map(tuple)

    return draw(st.lists(st.tuples(*map(bounds, shape)), min_size=1, max_size=5))


@given(st.data(), st.sampled_from([8, 40, 4 << 20]), st.sampled_from([2, 30, 1 << 16]))
def test_any_boxes_of_any_view_are_read(tmp_path_factory, data, band, waste):
    base, view = data.draw(views())
    boxes = data.draw(boxes_in(view.shape))
    path = tmp_path_factory.getbasetemp() / "views"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_BAND_NBYTES", band)
        patch.setattr(pieces, "_WASTE_NBYTES", waste)
        pieces.pieces_of.cache_clear()
        reader = ExtentsReader("here", {"x": stored_as(path, base, view)})
        parts = read(reader, "x", *boxes)
    for box, part in zip(boxes, parts, strict=True):
        np.testing.assert_array_equal(part, view[slices(box)])
        assert part.shape == shape_of(box) and part.dtype == base.dtype
        assert part.flags.c_contiguous and part.flags.writeable
    assert reader.bytes_read == sum(part.nbytes for part in parts)


@given(st.data())
def test_arrays_may_be_spread_over_several_files(tmp_path_factory, data):
    shape = data.draw(st.tuples(st.integers(2, 6), st.integers(2, 6)))
    array = np.arange(math.prod(shape), dtype="f4").reshape(shape)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(1, n - 1), max_size=2))}) for n in shape]
    boxes = list(itertools.product(*[itertools.pairwise(cut) for cut in cuts]))
    extents = []
    for number, box in enumerate(boxes):
        file = tmp_path_factory.getbasetemp() / f"part{number}"
        file.write_bytes(array[slices(box)].tobytes())
        extents.append(Extent(box, str(file), 0))
    reader = ExtentsReader("here", {"x": Stored(array_spec(array), tuple(extents))})
    wanted = data.draw(boxes_in(shape))
    for box, part in zip(wanted, read(reader, "x", *wanted), strict=True):
        np.testing.assert_array_equal(part, array[slices(box)])
    with pytest.raises(ckpt.CorruptCheckpointError, match="hole|outside|lie"):
        ExtentsReader("here", {"x": Stored(array_spec(array), tuple(extents[1:]))})


@pytest.fixture(autouse=True)
def fresh_plans():
    pieces.pieces_of.cache_clear()
    yield
    pieces.pieces_of.cache_clear()


def test_few_files_are_open_at_a_time_and_none_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_values, "_MAX_OPEN", 2)
    arrays = {str(n): np.full(1000, n, "i4") for n in range(20)}
    values = {key: stored_as(tmp_path / key, array, array) for key, array in arrays.items()}
    reader = ExtentsReader("here", values)
    requests = [(key, [((0, 1000),)]) for key in arrays]
    for number, (part,) in reader.read(requests, max_inflight_bytes=1 << 20):
        np.testing.assert_array_equal(part, arrays[requests[number][0]])
        assert len(open_files(str(tmp_path), deadline_seconds=0)) <= 2 + 16
    assert not open_files(str(tmp_path))


def pieces_for(shape, boxes):
    return pieces.pieces_of(whole(shape), c_strides(shape), tuple(boxes), 4)


def test_each_row_is_read_once_whatever_boxes_share_it():
    shape = (1000, 4096)
    quarters = [((0, 500), (a, a + 1024)) for a in range(0, 4096, 1024)]
    halves = [((500, 1000), (0, 2048)), ((500, 1000), (2048, 4096))]
    found = pieces_for(shape, [*quarters, *halves])
    assert sum(piece.nbytes for piece in found) == 4 * math.prod(shape)
    assert max(piece.nbytes for piece in found) <= 4 << 20
    assert all(piece.direct is None for piece in found)


def test_whole_rows_are_read_into_their_place():
    found = pieces_for((1000, 4096), [((0, 500), (0, 4096)), ((500, 1000), (0, 4096))])
    assert all(piece.direct is not None for piece in found)


def test_of_long_rows_only_what_is_needed_is_read():
    shape = (16, 1 << 20)
    found = pieces_for(shape, [((0, 16), (0, 100)), ((0, 16), (200, 300))])
    assert sum(piece.nbytes for piece in found) <= 16 * 300 * 4
    found = pieces_for((1, 1 << 24), [((0, 1), (0, 1 << 22))])
    assert sum(piece.nbytes for piece in found) == 4 << 22
    assert all(piece.direct is not None for piece in found)


def test_arrays_are_aligned_and_share_no_memory(tmp_path):
    base = np.arange(64, dtype="f4")
    reader = ExtentsReader("here", {"x": stored_as(tmp_path / "a", base, base)})
    one, two = read(reader, "x", ((0, 9),), ((0, 9),))
    one[:] = 0
    assert two[8] == 8
    assert not one.ctypes.data % 64 and not two.ctypes.data % 64


def test_no_more_than_the_given_memory_is_read_ahead(tmp_path):
    base = np.zeros(1 << 16, np.uint8)
    stored = stored_as(tmp_path / "a", base, base)
    reader = ExtentsReader("here", {str(i): stored for i in range(64)})
    requests = [(str(i), [((0, 1 << 16),)]) for i in range(64)]
    results = reader.read(requests, max_inflight_bytes=4 << 16)
    for taken, (number, _) in enumerate(results):
        assert number == taken
        assert reader.bytes_read == (taken + 1) << 16
    assert taken == 63


def test_byte_strings_and_values_in_memory(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"..text")
    text = Stored(LeafSpec("str", "bytes"), (Extent((), str(path), 2),), 4)
    values = {
        "text": text,
        "none": Stored.of(b""),
        "here": Stored.of(b"here"),
        "array": Stored.of(np.arange(6.0).reshape(2, 3)[:, ::2]),
        "swapped": Stored.of(np.arange(3, dtype=">i4")),
    }
    reader = ExtentsReader("here", values)
    assert [reader.read_bytes(key) for key in ("text", "none", "here")] == [b"text", b"", b"here"]
    assert read(reader, "array", ((1, 2), (0, 2)))[0].tolist() == [[3.0, 5.0]]
    assert read(reader, "swapped", ((0, 3),))[0].tolist() == [0, 1, 2]
    assert reader.index.nbytes("text") == 4 and reader.index.nbytes("array") == 32


def test_contents_that_are_made_are_cut_like_files(tmp_path):
    array = np.arange(12, dtype="f4").reshape(3, 4)

    def fill(buffer):
        buffer[:] = array.T.tobytes()

    extent = Extent(whole((3, 4)), "made", 0, (1, 3))
    reader = ExtentsReader("here", {"x": Stored(array_spec(array), (extent,), 48, fill)})
    everything, corner = read(reader, "x", whole((3, 4)), ((1, 3), (2, 4)))
    np.testing.assert_array_equal(everything, array)
    np.testing.assert_array_equal(corner, array[1:3, 2:4])


# --- checksums -------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("boxes", [[((0, 6), (0, 4))], [((0, 2), (0, 4)), ((2, 6), (0, 4))]])
def test_what_is_read_as_a_whole_is_checked(tmp_path, monkeypatch, boxes, transposed):
    monkeypatch.setattr(pieces, "_BAND_NBYTES", 8)
    base = np.arange(24, dtype="f4").reshape((4, 6) if transposed else (6, 4))
    stored = stored_as(tmp_path / "a", base, base.T if transposed else base)

    def reader(crc):
        (extent,) = stored.extents
        checksum = Checksum("crc32", crc, zlib.crc32(b"head"))
        extent = Extent(extent.box, extent.file, extent.offset, extent.strides, checksum)
        return ExtentsReader("here", {"x": Stored(stored.spec, (extent,))})

    good = zlib.crc32(b"head" + base.tobytes())
    read(reader(good), "x", *boxes)
    with pytest.raises(ckpt.CorruptCheckpointError, match=r"x: .*crc32 is 0x") as raised:
        read(reader(good ^ 1), "x", *boxes)
    assert raised.value.key == "x" and raised.value.file == str(tmp_path / "a")
    # A part of it cannot be checked.
    read(reader(good ^ 1), "x", ((0, 6), (0, 3)))


# --- damage ----------------------------------------------------------------------------


def test_a_value_outside_of_its_file_is_found_when_it_is_opened(tmp_path):
    base = np.arange(24, dtype="f4")
    stored = stored_as(tmp_path / "a", base, base)
    os.truncate(tmp_path / "a", 99)
    with pytest.raises(ckpt.CorruptCheckpointError, match="it has 99 bytes"):
        ExtentsReader("here", {"x": stored})
    (tmp_path / "a").unlink()
    with pytest.raises(ckpt.CorruptCheckpointError, match="No such file"):
        ExtentsReader("here", {"x": stored})


@pytest.mark.parametrize("change", ["truncated", "replaced", "removed"])
def test_a_file_that_changes_after_it_was_opened_is_not_read(tmp_path, change):
    path = tmp_path / "a"
    base = np.arange(24, dtype="f4")
    reader = ExtentsReader("here", {"x": stored_as(path, base, base)})
    before = reader.identity()
    assert before == reader.identity() and before is not None
    if change == "truncated":
        os.truncate(path, 50)
    elif change == "replaced":
        (tmp_path / "b").write_bytes(path.read_bytes())
        os.replace(tmp_path / "b", path)
    else:
        path.unlink()
    assert reader.identity() != before
    with pytest.raises(ckpt.CorruptCheckpointError, match="x: .*a: damaged or incomplete"):
        read(reader, "x", ((0, 24),))


def test_shapes_that_no_memory_holds_are_refused_before_any_is_taken(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(8))
    spec = LeafSpec("numpy", "float32", (1 << 40, 1 << 40))
    with pytest.raises(ckpt.CorruptCheckpointError, match="it has 8 bytes"):
        ExtentsReader("here", {"x": Stored(spec, (Extent(whole(spec.shape), str(path), 0),))})
    for extent in (
        Extent(((0, 2),), str(path), -4),
        Extent(((0, 2),), str(path), 4, (-1,)),
        Extent(((0, 3),), str(path), 0),
    ):
        with pytest.raises(ckpt.CorruptCheckpointError):
            ExtentsReader(
                "here", {"x": Stored(LeafSpec("numpy", "float32", shape_of(extent.box)), (extent,))}
            )


def test_errors_of_one_value_leave_the_others_readable(tmp_path):
    def broken(buffer):
        raise ValueError("no")

    extent = Extent(((0, 4),), "made", 0)
    values = {
        "bad": Stored(LeafSpec("numpy", "int8", (4,)), (extent,), 4, broken),
        "good": Stored.of(np.arange(3)),
        "listed": Stored(LeafSpec("unreadable", "sparse", (3,), note="it is sparse")),
    }
    reader = ExtentsReader("here", values)
    with pytest.raises(ValueError, match="no"):
        read(reader, "bad", ((0, 4),))
    assert read(reader, "good", ((0, 3),))[0].tolist() == [0, 1, 2]
    with pytest.raises(ckpt.UnsupportedFormatError, match=r"listed: it is sparse, or leave it out"):
        read(reader, "listed", ((0, 3),))
    with pytest.raises(ValueError, match="outside"):
        read(reader, "good", ((0, 4),))
    with pytest.raises(KeyError):
        read(reader, "nothing", ())


def test_leaving_the_iterator_early_leaves_no_work_behind(tmp_path):
    base = np.arange(1 << 20, dtype=np.uint8)
    reader = ExtentsReader("here", {"x": stored_as(tmp_path / "a", base, base)})
    results = reader.read([("x", [((0, 1 << 20),)])] * 50, max_inflight_bytes=64 << 20)
    next(results)
    results.close()
    assert not open_files(str(tmp_path))
    reader.close()
    with pytest.raises(RuntimeError, match="closed"):
        reader.read([("x", [((0, 1),)])], max_inflight_bytes=1)


def test_several_threads_may_read_at_once(tmp_path):
    base = np.arange(1 << 18, dtype="f4").reshape(512, 512)
    reader = ExtentsReader("here", {"x": stored_as(tmp_path / "a", base, base)})
    wrong = []

    def work(column):
        box = ((0, 512), (column, column + 64))
        for _ in range(20):
            if not np.array_equal(read(reader, "x", box)[0], base[slices(box)]):
                wrong.append(column)

    threads = [threading.Thread(target=work, args=(64 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore")  # JAX and Python warn of forks
def test_a_forked_child_reads_with_threads_of_its_own(tmp_path):
    base = np.arange(1 << 16, dtype="f4")
    reader = ExtentsReader("here", {"x": stored_as(tmp_path / "a", base, base)})
    read(reader, "x", ((0, 1 << 16),))
    program = os.fork()
    if not program:
        right = np.array_equal(read(reader, "x", ((0, 1 << 16),))[0], base)
        os._exit(0 if right else 1)
    assert os.waitpid(program, 0)[1] == 0


def test_strides():
    assert c_strides(()) == () and c_strides((5,)) == (1,)
