"""A conformance suite for storages: the places where checkpoints lie.

`StorageConformance` is what file systems and object stores have to pass, and shows what the library
relies on. Subclass it, say where an empty place is, and pytest runs every promise of
`ckpt_jax.store.storage.Storage` there. This way a new object store can be tried before it is used:

    from ckpt_jax.testing import StorageConformance

    class TestMyStore(StorageConformance):
        def make_directory(self, tmp_path):
            return f"s3://my-bucket/conformance-{tmp_path.name}"

This module needs pytest, which the package itself does not.
"""

from __future__ import annotations

import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from ckpt_jax.api.preflight import preflight
from ckpt_jax.errors import CheckpointNotFoundError
from ckpt_jax.io import read_slices, write_shard
from ckpt_jax.store.directory import checkpoints_in
from ckpt_jax.store.files import read_file, replace_file
from ckpt_jax.store.guard import changing
from ckpt_jax.store.merge import SHARDS, assemble, read_shard
from ckpt_jax.store.storage import Pinned, Stage, Storage, storage_of

_SAVERS = 8
_CHANGES = 10  # of each thread
_SHAPE = (5, 3)


class StorageConformance:
    """The tests that every storage has to pass.

    Subclass it, with a name that pytest collects, and override `make_directory`; also
    `make_storage` if the library does not choose the storage by the path.
    """

    # --- to override -------------------------------------------------------------------

    def make_directory(self, tmp_path: pathlib.Path) -> str:
        """The path of a place where nothing is.

        Args:
          tmp_path: an empty directory of the test, whose name no other test has.
        """
        raise NotImplementedError

    def make_storage(self, directory: str) -> Storage:
        """The storage of a directory."""
        return storage_of(directory)

    # --- the tests: saving -------------------------------------------------------------

    def test_a_checkpoint_is_there_when_it_is_published_and_not_before(
        self, tmp_path: pathlib.Path
    ) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        with _staged(storage, path, 1) as publish:
            assert storage.generation(path) is None
            with pytest.raises(CheckpointNotFoundError):
                storage.open(storage.located(path), path)
            publish()
        assert _number_at(path) == 1
        assert storage.generation(path) is not None
        storage.open(storage.located(path), path).close()

    def test_a_checkpoint_is_created_once(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        _save(storage, path, 1)
        with pytest.raises(FileExistsError):
            _save(storage, path, 2)
        assert _number_at(path) == 1

    def test_of_two_saves_that_meet_the_first_one_wins(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        with pytest.raises(FileExistsError), _staged(storage, path, 1) as publish:
            _save(storage, path, 2)
            publish()
        assert _number_at(path) == 2

    def test_of_many_saves_that_meet_one_wins_and_is_wholly_its_own(
        self, tmp_path: pathlib.Path
    ) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        ready = threading.Barrier(_SAVERS)

        def save(number: int) -> bool:
            try:
                with _staged(storage, path, number) as publish:
                    ready.wait()
                    publish()
            except FileExistsError:
                return False
            return True

        winners = [number for number, won in enumerate(_at_once(save, _SAVERS)) if won]
        assert [_number_at(path)] == winners

    def test_a_checkpoint_is_replaced_in_one_step(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        _save(storage, path, 1)
        before = storage.generation(path)
        with _staged(storage, path, 2, overwrite=True) as publish:
            assert _number_at(path) == 1
            assert storage.generation(path) == before
            publish()
        assert _number_at(path) == 2
        assert storage.generation(path) not in (None, before)

    def test_no_update_is_lost_without_a_word(self, tmp_path: pathlib.Path) -> None:
        """Both replace what they found, one after the other, or the later one is refused."""
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        _save(storage, path, 1)
        reported = 2
        try:
            with _staged(storage, path, 3, overwrite=True) as publish:
                _save(storage, path, 2, overwrite=True)
                publish()
            reported = 3
        except FileExistsError:
            pass
        assert _number_at(path) == reported

    def test_a_save_that_fails_leaves_what_was_there(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        for path, before in ((f"{directory}/a", None), (f"{directory}/b", 1)):
            if before is not None:
                _save(storage, path, before)
            with pytest.raises(ZeroDivisionError), _staged(storage, path, 2, overwrite=True):
                raise ZeroDivisionError
            if before is None:
                assert storage.generation(path) is None
            else:
                assert _number_at(path) == before
            _save(storage, path, 3, overwrite=True)
            assert _number_at(path) == 3

    def test_the_time_of_a_save_is_told_or_not(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        assert storage.saved_at(path) is None
        _save(storage, path, 1)
        saved = storage.saved_at(path)
        assert saved is None or abs(saved - time.time()) < 600  # their clocks may differ

    # --- finding and removing ------------------------------------------------------------

    def test_what_is_saved_is_listed_at_once(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        assert checkpoints_in(directory) == []
        for count, name in enumerate(("ckpt-7", "ckpt-70", "ckpt-8"), 1):
            _save(storage, f"{directory}/{name}", count)
            assert len(checkpoints_in(directory)) == count
        assert checkpoints_in(directory) == ["ckpt-7", "ckpt-8", "ckpt-70"]
        _remove(storage, f"{directory}/ckpt-8")
        assert checkpoints_in(directory) == ["ckpt-7", "ckpt-70"]

    def test_a_removal_leaves_its_neighbours(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        names = ["ckpt-7", "ckpt-70", "ckpt-7x", "ckpt-6"]
        for number, name in enumerate(names):
            _save(storage, f"{directory}/{name}", number)
        _remove(storage, f"{directory}/ckpt-7")
        assert storage.generation(f"{directory}/ckpt-7") is None
        with pytest.raises(CheckpointNotFoundError):
            storage.open(f"{directory}/ckpt-7", f"{directory}/ckpt-7")
        for number, name in enumerate(names[1:], 1):
            assert _number_at(f"{directory}/{name}") == number

    def test_what_was_removed_can_be_saved_again(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        for number in (1, 2):
            _save(storage, path, number)
            assert _number_at(path) == number
            _remove(storage, path)
            assert storage.generation(path) is None

    def test_to_remove_nothing_is_no_error(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        _remove(storage, f"{directory}/a")
        assert storage.generation(f"{directory}/a") is None

    def test_what_is_no_checkpoint_is_not_removed(self, tmp_path: pathlib.Path) -> None:
        storage, directory = self._place(tmp_path)
        replace_file(f"{directory}/notes", "mine")
        with pytest.raises(CheckpointNotFoundError):
            _remove(storage, f"{directory}/notes")
        assert read_file(f"{directory}/notes") == "mine"

    # --- readers -------------------------------------------------------------------------

    def test_a_generation_stays_as_long_as_the_checkpoint_does(
        self, tmp_path: pathlib.Path
    ) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        _save(storage, path, 1)
        location = storage.located(path)
        before = storage.generation(location), storage.entries(location)
        _number_at(path)
        _save(storage, f"{directory}/b", 2)
        assert (storage.generation(location), storage.entries(location)) == before
        assert storage.located(path) == location

    @pytest.mark.parametrize("act", ["replaced", "removed"])
    def test_a_reader_notices_that_its_checkpoint_is_gone(
        self, tmp_path: pathlib.Path, act: str
    ) -> None:
        storage, directory = self._place(tmp_path)
        path = f"{directory}/a"
        _save(storage, path, 1)
        pinned = Pinned.of(path, storage.located(path), storage)
        pinned.check()
        if act == "replaced":
            _save(storage, path, 2, overwrite=True)
        else:
            _remove(storage, path)
        with pytest.raises(CheckpointNotFoundError, match="replaced or removed"):
            pinned.check()

    # --- small files ---------------------------------------------------------------------

    def test_no_change_of_a_small_file_is_lost(self, tmp_path: pathlib.Path) -> None:
        _, directory = self._place(tmp_path)
        path = f"{directory}/count"
        replace_file(path, "0")

        def add() -> None:
            replace_file(path, str(int(read_file(path) or "0") + 1))

        def add_often(number: int) -> None:
            for _ in range(_CHANGES):
                changing(directory, add)

        _at_once(add_often, 3)
        assert read_file(path) == str(3 * _CHANGES)

    def test_preflight_finds_nothing_wrong(self, tmp_path: pathlib.Path) -> None:
        _, directory = self._place(tmp_path)
        preflight(directory)
        assert checkpoints_in(directory) == []

    # -----------------------------------------------------------------------------------

    def _place(self, tmp_path: pathlib.Path) -> tuple[Storage, str]:
        directory = self.make_directory(tmp_path)
        return self.make_storage(directory), directory


@contextmanager
def _staged(
    storage: Storage, path: str, number: int, *, overwrite: bool = False
) -> Iterator[Callable[[], None]]:
    """A checkpoint that is written, and the function that publishes it."""
    stage: Stage = storage.stage(path, secrets.token_hex(16))
    with stage.claimed(overwrite=overwrite, durable=True):
        begin = f"{stage.mark}-" if stage.mark else ""
        shards = os.path.join(stage.directory, SHARDS)
        if not stage.mark:
            os.makedirs(shards, exist_ok=True)
        shard = write_shard(f"{shards}/{begin}00000-00000", {"x": np.full(_SHAPE, number)})
        entry, table = read_shard(shard)
        stage.check()
        parts = assemble(
            [(entry, table.digest)], {table.digest: table}, stage.directory, mark=stage.mark
        )
        stage.complete(parts, durable=True)
        yield lambda: stage.publish(overwrite=overwrite, durable=True)


def _remove(storage: Storage, path: str) -> None:
    with storage.removing(path) as remove_rest:
        if remove_rest is not None:
            remove_rest()


def _save(storage: Storage, path: str, number: int, *, overwrite: bool = False) -> None:
    with _staged(storage, path, number, overwrite=overwrite) as publish:
        publish()


def _number_at(path: str) -> int:
    """The number that was saved at a path. All values have to be the same."""
    found = np.asarray(read_slices(path, {"x": None})["x"])
    numbers = np.unique(found)
    assert found.shape == _SHAPE and len(numbers) == 1, found
    return int(numbers[0])


def _at_once(act: Callable[[int], object], count: int) -> list[object]:
    """What a function returns on several threads at once, given the number of each."""
    results: dict[int, object] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = act(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(count)]


__all__ = ["StorageConformance"]
