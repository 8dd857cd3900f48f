"""A conformance suite for registered savers.

A *saver* writes and reads the objects of one kind itself, instead of having them taken apart. The
author of a saver subclasses `SaverTests`, says how to make an object and how to compare two, and
pytest runs every promise of `ckpt_jax.register_checkpoint_saver` against the saver:

    from ckpt_jax.testing import SaverTests

    class TestTableSaver(SaverTests):
        def register(self):
            my_package.register_saver()

        def make_object(self, seed):
            return Table(np.random.default_rng(seed).normal(size=(10, 3)))

        def make_empty(self):
            return Table(np.zeros((10, 3)))

        def assert_same(self, a, b):
            np.testing.assert_array_equal(a.values, b.values)

This module needs pytest, which the package itself does not.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from ckpt_jax.api.checkpoint import Checkpoint
from ckpt_jax.api.inspect import load_checkpoint
from ckpt_jax.api.tree import restore, save
from ckpt_jax.errors import RegistrationError
from ckpt_jax.objects.registry import (
    RegisteredSaver,
    get_saver,
    register_checkpoint_saver,
    registration_scope,
    saver_name,
    unregister_checkpoint_saver,
)
from ckpt_jax.objects.trackable import AutoTrackable
from ckpt_jax.objects.views import view_of
from ckpt_jax.options import CheckpointOptions


class SaverTests:
    """The tests that every registered saver has to pass.

    Subclass it, with a name that pytest collects. Override `register`, `make_object`, `make_empty`
    and `assert_same`; also `make_resharded` if the objects hold arrays that may lie on other
    devices. Objects may be mutable. If they are not, the saver's restore function returns new ones.
    """

    # --- to override -------------------------------------------------------------------

    def register(self) -> None:
        """Registers the saver, and views if it needs them. This is undone after each test.

        If the saver is registered when a module is imported, nothing is left to do here.
        """
        raise NotImplementedError

    def make_object(self, seed: int) -> Any:
        """An object that the saver accepts. Objects of different seeds differ."""
        raise NotImplementedError

    def make_empty(self) -> Any:
        """An object to restore into: of the same shape, with values of its own."""
        raise NotImplementedError

    def assert_same(self, a: Any, b: Any) -> None:
        """Raises AssertionError unless two objects hold the same values, children included.

        If the saver loses precision, this accepts that loss and no more.
        """
        raise NotImplementedError

    def make_resharded(self) -> Any | None:
        """Like `make_empty`, with its arrays on other devices or divided differently; None if
        the objects hold no such arrays."""
        return None

    # --- the tests ---------------------------------------------------------------------

    def test_objects_of_different_seeds_and_empty_ones_differ(self) -> None:
        for other in (self.make_object(1), self.make_empty()):
            with pytest.raises(AssertionError):
                self.assert_same(self.make_object(0), other)
        self.assert_same(self.make_object(0), self.make_object(0))

    def test_an_object_comes_back(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
            self.assert_same(self.make_object(0), _read(path, object=self.make_empty()).object)

    def test_a_tree_that_holds_the_object_comes_back(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = save(tmp_path / "a", {"object": self.make_object(0), "step": 7})
            tree = restore(path, {"object": self.make_empty(), "step": 0})
        self.assert_same(self.make_object(0), tree["object"])
        assert tree["step"] == 7

    def test_the_object_itself_can_be_the_root(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = save(tmp_path / "a", self.make_object(0))
            self.assert_same(self.make_object(0), restore(path, self.make_empty()))

    def test_several_objects_keep_their_own_values(self, tmp_path: pathlib.Path) -> None:
        names = ("one", "two", "three")
        with self._registered():
            path = Checkpoint(
                **{name: self.make_object(seed) for seed, name in enumerate(names)}
            ).write(tmp_path / "a")
            restored = _read(path, **{name: self.make_empty() for name in names})
        for seed, name in enumerate(names):
            self.assert_same(self.make_object(seed), getattr(restored, name))

    def test_some_of_the_objects_can_be_restored(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = Checkpoint(one=self.make_object(1), two=self.make_object(2)).write(
                tmp_path / "a"
            )
            self.assert_same(self.make_object(2), _read(path, two=self.make_empty()).two)

    def test_names_with_slashes_and_dots_are_kept_apart(self, tmp_path: pathlib.Path) -> None:
        def tree(*objects: Any) -> dict[str, Any]:
            a, b, c, d = objects
            return {"a/b": a, "a": {"b": b}, "a.b": c, "..": d}

        with self._registered():
            path = save(tmp_path / "a", tree(*(self.make_object(seed) for seed in range(4))))
            found = restore(path, tree(*(self.make_empty() for _ in range(4))))
        restored = (found["a/b"], found["a"]["b"], found["a.b"], found[".."])
        for seed, obj in enumerate(restored):
            self.assert_same(self.make_object(seed), obj)

    def test_two_saves_in_a_row_hold_their_own_values(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            paths = [
                Checkpoint(object=self.make_object(seed)).write(tmp_path / str(seed))
                for seed in range(2)
            ]
            for seed, path in enumerate(paths):
                restored = _read(path, object=self.make_empty()).object
                self.assert_same(self.make_object(seed), restored)

    def test_a_save_replaces_an_earlier_one(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
            path = Checkpoint(object=self.make_object(1)).write(tmp_path / "a")
            self.assert_same(self.make_object(1), _read(path, object=self.make_empty()).object)

    def test_a_save_in_the_background_holds_what_was_there(self, tmp_path: pathlib.Path) -> None:
        background = CheckpointOptions(enable_async=True)
        with self._registered():
            other = Checkpoint(object=self.make_object(1)).write(tmp_path / "other")
            checkpoint = Checkpoint(object=self.make_object(0))
            path = checkpoint.write(tmp_path / "a", options=background)
            checkpoint.read(other)  # mutable objects change while they are written
            checkpoint.sync()
            self.assert_same(self.make_object(0), _read(path, object=self.make_empty()).object)

    def test_the_children_are_saved_as_usual(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            obj = self.make_object(0)
            view = view_of(obj)
            assert view is not None
            labels = [label for label, _ in view.children(obj)]
            if not labels:
                pytest.skip("the object has no children")
            path = save(tmp_path / "a", obj)
        with load_checkpoint(path) as reader:
            root = reader.object_graph.nodes[0]
            assert [label for label, _ in root.children] == labels
            assert not root.attributes
            assert not list(reader.disagreements())

    def test_the_checkpoint_names_the_saver_and_the_object(self, tmp_path: pathlib.Path) -> None:
        with self._registered() as saver:
            path = save(tmp_path / "a", {"object": self.make_object(0)})
        with load_checkpoint(path) as reader:
            found = [node.saver for node in reader.object_graph.nodes if node.saver]
        assert (saver.name, "object") in [(ref.name, ref.object_name) for ref in found]

    def test_an_object_comes_back_in_another_sharding(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            target = self.make_resharded()
            if target is None:
                pytest.skip("the object has no sharding")
            path = Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
            self.assert_same(self.make_object(0), _read(path, object=target).object)

    def test_a_program_without_the_saver_is_told_its_name(self, tmp_path: pathlib.Path) -> None:
        with self._registered() as saver:
            path = Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
            unregister_checkpoint_saver(saver.name)
            with pytest.raises(RegistrationError, match=saver.name) as caught:
                Checkpoint(object=AutoTrackable()).read(path)
        assert "cannot be found" in str(caught.value)

    def test_a_strict_saver_refuses_objects_of_another_kind(self, tmp_path: pathlib.Path) -> None:
        with self._registered() as saver:
            path = Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
            _register_again(saver, strict=True)
            with pytest.raises(RegistrationError, match="cannot be used") as caught:
                Checkpoint(object=AutoTrackable()).read(path)
        assert saver.name in str(caught.value)

    def test_a_lenient_saver_skips_objects_of_another_kind(self, tmp_path: pathlib.Path) -> None:
        with self._registered() as saver:
            path = Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
            _register_again(saver, strict=False)
            other = AutoTrackable()
            assert _read(path, object=other).object is other

    def test_nothing_is_left_of_a_save_that_fails(self, tmp_path: pathlib.Path) -> None:
        with self._registered() as saver:

            def save_and_fail(objects: dict[str, Any], file_prefix: str) -> None:
                saver.save_fn(objects, file_prefix)
                raise OSError("no space left")

            _register_again(saver, save_fn=save_and_fail)
            with pytest.raises(OSError, match="no space left"):
                Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
        assert os.listdir(tmp_path) == []

    def test_a_save_that_fails_leaves_the_earlier_checkpoint(self, tmp_path: pathlib.Path) -> None:
        with self._registered() as saver:
            path = Checkpoint(object=self.make_object(0)).write(tmp_path / "a")

            def fail(objects: dict[str, Any], file_prefix: str) -> None:
                raise OSError("no space left")

            _register_again(saver, save_fn=fail)
            with pytest.raises(OSError, match="no space left"):
                Checkpoint(object=self.make_object(1)).write(tmp_path / "a")
            self.assert_same(self.make_object(0), _read(path, object=self.make_empty()).object)
        assert os.listdir(tmp_path) == ["a"]

    # -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _registered(self) -> Iterator[RegisteredSaver]:
        """The saver, registered for the block."""
        with registration_scope():
            self.register()
            name = saver_name(self.make_object(0))
            assert name is not None, "no registered saver accepts what make_object makes"
            assert saver_name(self.make_empty()) == name, "the saver refuses what make_empty makes"
            yield get_saver(name)


def _read(path: str | None, **named: Any) -> Checkpoint:
    """A checkpoint of these objects, restored."""
    checkpoint = Checkpoint(**named)
    checkpoint.read(path).expect_partial()
    return checkpoint


def _register_again(
    saver: RegisteredSaver, *, save_fn: Any = None, strict: bool | None = None
) -> None:
    """Replaces a saver by one with another `save_fn` or another strictness."""
    unregister_checkpoint_saver(saver.name)
    package, _, name = saver.name.partition(".")
    register_checkpoint_saver(
        package=package,
        name=name,
        predicate=saver.predicate,
        save_fn=save_fn or saver.save_fn,
        restore_fn=saver.restore_fn,
        strict_predicate_restore=saver.strict_predicate_restore if strict is None else strict,
    )


__all__ = ["SaverTests"]
