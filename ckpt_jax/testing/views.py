"""A conformance suite for views, and for any kind of object that the library can save.

A *view* tells the library what is inside objects of one kind: their children, each under a label,
and how to rebuild an object with other children. The author of a view subclasses `ViewTests`, says
how to make an object and how to compare two, and pytest runs every promise of
`ckpt_jax.register_view`:

    from ckpt_jax.testing import ViewTests

    class TestPointView(ViewTests):
        def register(self):
            ckpt_jax.register_view(
                Point, children=lambda p: {"xy": p.xy}, rebuild=lambda p, new: Point(new["xy"])
            )

        def make_object(self, seed):
            return Point(np.random.default_rng(seed).normal(size=2))

        def make_empty(self):
            return Point(np.zeros(2))

        def assert_same(self, a, b):
            np.testing.assert_array_equal(a.xy, b.xy)

Objects that need no registered view can be tested in the same way: modules, dataclasses, or a
`ckpt_jax.Trackable` of your own. This module needs pytest, which the package itself does not.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from ckpt_jax.api.checkpoint import Checkpoint
from ckpt_jax.api.inspect import load_checkpoint
from ckpt_jax.api.tree import load, plan_restore, restore, save
from ckpt_jax.errors import RestoreMismatchError
from ckpt_jax.graph.labels import Label, is_label
from ckpt_jax.matching.live import live_graph
from ckpt_jax.objects.registry import registration_scope
from ckpt_jax.objects.trackable import AutoTrackable
from ckpt_jax.objects.views import View, view_of
from ckpt_jax.options import CheckpointOptions

_PLAIN_CONTAINERS = (dict, list, tuple)
_PLAIN_VALUES = (np.ndarray, np.generic, jax.Array, str, bytes, bool, int, float, complex)


class ViewTests:
    """The tests that every kind of object has to pass.

    Subclass it, with a name that pytest collects. Override `make_object`, `make_empty` and
    `assert_same`, and `register` if the objects need a view of their own. Override the other
    methods if such objects exist.

    Attributes:
      is_restored_in_place: whether a restore changes its target and returns it. If not, the target
        has to stay as it is, and the restore returns another object.
    """

    is_restored_in_place: bool = False

    # --- to override -------------------------------------------------------------------

    def register(self) -> None:
        """Registers the view. This is undone after each test.

        If there is no view to register, or if it is registered when a module is imported, nothing
        is left to do here.
        """

    def make_object(self, seed: int) -> Any:
        """An object of the kind. Objects of different seeds have the same structure and other
        values."""
        raise NotImplementedError

    def make_empty(self) -> Any:
        """An object to restore into: of the same structure, with values of its own."""
        raise NotImplementedError

    def assert_same(self, a: Any, b: Any) -> None:
        """Raises AssertionError unless two objects hold the same values."""
        raise NotImplementedError

    def make_abstract(self) -> Any | None:
        """Like `make_empty`, with `jax.ShapeDtypeStruct`s instead of arrays; None if the objects
        cannot hold these."""
        return None

    def make_unfinished(self) -> Any | None:
        """An object that gets some of its children only later; None if there are no such objects.

        A restore into it waits for these children. Only trackables can announce them.
        """
        return None

    def finish(self, unfinished: Any) -> None:
        """Gives an unfinished object the rest of its children."""
        raise NotImplementedError

    # --- what the tests rely on --------------------------------------------------------

    def test_objects_of_different_seeds_and_empty_ones_differ(self) -> None:
        with self._registered():
            for other in (self.make_object(1), self.make_empty()):
                with pytest.raises(AssertionError):
                    self.assert_same(self.make_object(0), other)
            self.assert_same(self.make_object(0), self.make_object(0))
            self.assert_same(self.make_empty(), self.make_empty())

    # --- the view ----------------------------------------------------------------------

    def test_the_labels_of_the_children_are_distinct(self) -> None:
        with self._registered():
            labels = _labels(self.make_object(0))
        assert len(set(map(repr, labels))) == len(labels), labels
        assert all(map(is_label, labels)), labels

    def test_the_labels_of_the_children_are_always_the_same(self) -> None:
        with self._registered():
            obj = self.make_object(0)
            labels = _labels(obj)
            assert _labels(obj) == labels
            for other in (self.make_object(0), self.make_object(1), self.make_empty()):
                # Dicts of one structure may be in different orders.
                assert sorted(map(repr, _labels(other))) == sorted(map(repr, labels))

    def test_children_that_are_objects_of_their_own_are_always_the_same_ones(self) -> None:
        with self._registered():
            obj = self.make_object(0)
            first, second = _children(obj), _children(obj)
            for label in first:
                if _has_identity(first[label]):
                    assert first[label] is second[label], f"{label!r} is another object each time"

    def test_looking_at_an_object_does_not_change_it(self) -> None:
        with self._registered():
            obj = self.make_object(0)
            view = _view(obj)
            list(view.children(obj))
            dict(view.values(obj))
            self.assert_same(obj, self.make_object(0))

    def test_rebuilding_without_changes_keeps_the_values(self) -> None:
        with self._registered():
            obj = self.make_object(0)
            if not _children(obj):
                pytest.skip("the object has no children")
            rebuilt = _view(obj).rebuild(obj, {})
            self.assert_same(rebuilt, self.make_object(0))
            self.assert_same(obj, self.make_object(0))
            if self.is_restored_in_place:
                assert rebuilt is obj

    def test_rebuilding_takes_over_children_one_by_one(self) -> None:
        with self._registered():
            source, empty = self.make_object(0), self.make_empty()
            view = _view(source)
            if _has_slots(source):
                pytest.skip("an optimizer's slot variables are no children")
            rebuilt = empty
            for label, child in _children(source).items():
                rebuilt = view.rebuild(rebuilt, {label: child})
            if values := {name: _evaluated(value) for name, value in view.values(source).items()}:
                rebuilt = view.assign(rebuilt, values)
            self.assert_same(rebuilt, self.make_object(0))
            self._assert_in_its_place(rebuilt, empty)

    # --- saving and restoring ----------------------------------------------------------

    def test_saving_does_not_change_the_object(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            obj = self.make_object(0)
            children = _children(obj)
            tree = {"object": obj}
            save(tmp_path / "a", tree)
            Checkpoint(object=obj).write(tmp_path / "b")
            assert tree["object"] is obj
            self.assert_same(obj, self.make_object(0))
            for label, child in _children(obj).items():
                assert child is children[label] or not _has_identity(child)

    def test_an_object_comes_back(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = save(tmp_path / "a", self.make_object(0))
            target = self.make_empty()
            restored = restore(path, target)
            self.assert_same(restored, self.make_object(0))
            self._assert_in_its_place(restored, target)

    def test_an_object_in_a_checkpoint_comes_back(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
            target = self.make_empty()
            checkpoint = Checkpoint(object=target)
            checkpoint.read(path).assert_consumed()
            self.assert_same(checkpoint.object, self.make_object(0))
            self._assert_in_its_place(checkpoint.object, target)

    def test_objects_inside_other_objects_come_back(self, tmp_path: pathlib.Path) -> None:
        def tree(*objects: Any) -> dict[str, Any]:
            holder = AutoTrackable()
            holder.object = objects[3]
            return {
                "list": [objects[0], 1],
                "tuple": (2, {"deep": objects[1]}),
                "a/b": objects[2],
                "holder": holder,
            }

        with self._registered():
            path = save(tmp_path / "a", tree(*map(self.make_object, range(4))))
            target = tree(*[self.make_empty() for _ in range(4)])
            found = restore(path, target)
            assert (found["list"][1], found["tuple"][0]) == (1, 2)
            assert found["holder"] is target["holder"]
            objects = (
                found["list"][0],
                found["tuple"][1]["deep"],
                found["a/b"],
                found["holder"].object,
            )
            for seed, obj in enumerate(objects):
                self.assert_same(obj, self.make_object(seed))
            self._assert_in_its_place(found["list"][0], target["list"][0])

    def test_an_object_in_two_places_comes_back_in_both(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            obj = self.make_object(0)
            path = save(tmp_path / "a", {"one": obj, "two": [obj]})
            target = self.make_empty()
            found = restore(path, {"one": target, "two": [target]})
            for restored in (found["one"], found["two"][0]):
                self.assert_same(restored, self.make_object(0))
                self._assert_in_its_place(restored, target)

    def test_an_object_can_be_restored_again(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            paths = [save(tmp_path / str(seed), self.make_object(seed)) for seed in range(2)]
            target = self.make_empty()
            for seed in (0, 1, 0):
                target = restore(paths[seed], target)
                self.assert_same(target, self.make_object(seed))

    def test_a_save_in_the_background_holds_what_was_there(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            other = Checkpoint(object=self.make_object(1)).write(tmp_path / "other")
            checkpoint = Checkpoint(object=self.make_object(0))
            path = checkpoint.write(tmp_path / "a", options=CheckpointOptions(enable_async=True))
            checkpoint.read(other)  # what is restored in place changes while it is written
            checkpoint.sync()
            self.assert_same(checkpoint.object, self.make_object(1))
            restored = Checkpoint(object=self.make_empty())
            restored.read(path)
            self.assert_same(restored.object, self.make_object(0))

    def test_an_object_comes_back_into_an_abstract_one(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            target = self.make_abstract()
            if target is None:
                pytest.skip("make_abstract gives none")
            path = save(tmp_path / "a", [self.make_object(0)])
            (restored,) = restore(path, [target])
            self.assert_same(restored, self.make_object(0))

    def test_an_object_that_its_parent_gets_later_is_restored_then(
        self, tmp_path: pathlib.Path
    ) -> None:
        def holding(obj: Any) -> AutoTrackable:
            holder = AutoTrackable()
            holder.object = obj
            return holder

        with self._registered():
            path = Checkpoint(holder=holding(self.make_object(0))).write(tmp_path / "a")
            holder = AutoTrackable()
            status = Checkpoint(holder=holder).read(path)
            holder.object = self.make_empty()
            self.assert_same(holder.object, self.make_object(0))
            status.assert_consumed()

    def test_children_that_come_later_are_restored_then(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            unfinished = self.make_unfinished()
            if unfinished is None:
                pytest.skip("make_unfinished gives none")
            path = Checkpoint(object=self.make_object(0)).write(tmp_path / "a")
            status = Checkpoint(object=unfinished).read(path)
            self.finish(unfinished)
            self.assert_same(unfinished, self.make_object(0))
            status.assert_consumed()

    # --- reports -----------------------------------------------------------------------

    def test_a_plan_reports_each_value_and_changes_nothing(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = save(tmp_path / "a", {"object": self.make_object(0)})
            target = self.make_empty()
            report = plan_restore(path, {"object": target})
            self.assert_same(target, self.make_empty())
            assert report.exact, str(report)
            assert sorted(entry.path for entry in report.restored) == _value_paths(path)

    def test_missing_values_are_all_reported_and_nothing_changes(
        self, tmp_path: pathlib.Path
    ) -> None:
        with self._registered():
            full = save(tmp_path / "full", {"object": self.make_object(0), "step": 7})
            lacking = save(tmp_path / "lacking", {"step": 7})
            target = self.make_empty()
            with pytest.raises(RestoreMismatchError) as caught:
                restore(lacking, {"object": target, "step": 0})
            self.assert_same(target, self.make_empty())
            missing = [entry.path for entry in caught.value.report.missing]
            assert sorted([*missing, "step"]) == _value_paths(full)

    def test_without_strict_an_object_keeps_values_that_are_missing(
        self, tmp_path: pathlib.Path
    ) -> None:
        with self._registered():
            path = save(tmp_path / "a", {"step": 7})
            found = restore(path, {"object": self.make_empty(), "step": 0}, strict=False)
            assert found["step"] == 7
            self.assert_same(found["object"], self.make_empty())

    def test_unexpected_values_are_all_reported(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = save(tmp_path / "a", {"object": self.make_object(0), "step": 7})
            with pytest.raises(RestoreMismatchError) as caught:
                restore(path, {"step": 0})
            unexpected = [entry.path for entry in caught.value.report.unexpected]
            assert sorted([*unexpected, "step"]) == _value_paths(path)

    def test_arrays_of_another_shape_are_reported_and_nothing_changes(
        self, tmp_path: pathlib.Path
    ) -> None:
        with self._registered():
            data = load(save(tmp_path / "a", {"object": self.make_object(0)}))
            other = jax.tree.map(_with_another_axis, data)
            if jax.tree.all(jax.tree.map(lambda a, b: a is b, data, other)):
                pytest.skip("the object holds no arrays")
            path = save(tmp_path / "b", other)
            target = self.make_empty()
            with pytest.raises(RestoreMismatchError) as caught:
                restore(path, {"object": target})
            assert caught.value.report.mismatched
            self.assert_same(target, self.make_empty())

    def test_without_a_target_an_object_is_plain_data(self, tmp_path: pathlib.Path) -> None:
        with self._registered():
            path = save(tmp_path / "a", {"object": self.make_object(0)})
        _assert_plain(load(path), "")

    # -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _registered(self) -> Iterator[None]:
        """The view, registered for the block."""
        with registration_scope():
            self.register()
            assert view_of(self.make_object(0)) is not None, "no view knows what make_object makes"
            yield

    def _assert_in_its_place(self, restored: Any, target: Any) -> None:
        """Checks that the target itself was restored, or that it is as it was."""
        if self.is_restored_in_place:
            assert restored is target, (
                "is_restored_in_place is True, but the restored object is not the target"
            )
        else:
            assert restored is not target, (
                "is_restored_in_place is False, but the restored object is the target"
            )
            self.assert_same(target, self.make_empty())


def _view(obj: Any) -> View:
    view = view_of(obj)
    assert view is not None
    return view


def _labels(obj: Any) -> list[Label]:
    return [label for label, _ in _view(obj).children(obj)]


def _children(obj: Any) -> dict[Label, Any]:
    return dict(_view(obj).children(obj))


def _has_identity(child: Any) -> bool:
    view = view_of(child)
    return view is not None and (view.identity or view.mutable)


def _has_slots(obj: Any) -> bool:
    """Whether an object is an optimizer. Slot variables of an optimizer that is saved alone become
    children of its node."""
    graph = live_graph(obj).graph
    return bool(graph.slot_nodes) or len(graph.nodes[0].children) > len(_labels(obj))


def _evaluated(value: Any) -> Any:
    return value() if callable(value) else value


def _value_paths(path: str) -> list[str]:
    """The paths of all values in a checkpoint."""
    with load_checkpoint(path) as reader:
        graph = reader.object_graph
        return sorted([graph.value_path(node, found.name) for node, found in graph.attributes()])


def _with_another_axis(value: Any) -> Any:
    return value[None] if isinstance(value, np.ndarray) else value


def _assert_plain(data: Any, path: str) -> None:
    if type(data) in _PLAIN_CONTAINERS:
        items = data.items() if isinstance(data, Mapping) else enumerate(data)
        for label, child in items:
            _assert_plain(child, f"{path}/{label}")
    else:
        assert data is None or isinstance(data, _PLAIN_VALUES), f"{path} is a {type(data)}"


__all__ = ["ViewTests"]
