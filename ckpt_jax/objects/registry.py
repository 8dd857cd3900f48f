"""The registries: savers that programs write for their own objects, and classes that have names.

A registered saver takes the objects that its predicate accepts; the newest saver is asked first.
The checkpoint stores the saver's name beside each object, and a restore looks for the saver of
that name. An object of a registered class can be recreated by name, without a target.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ckpt_jax.errors import RegistrationError
from ckpt_jax.objects.python_state import PythonState
from ckpt_jax.objects.views import view_registration_scope

C = TypeVar("C", bound=type)
SaveFn = Callable[[dict[str, Any], str], "str | list[str] | None"]
RestoreFn = Callable[[dict[str, Any], str], "dict[str, Any] | None"]

_NAME = re.compile(r"[a-zA-Z0-9._-]+")


@dataclass(frozen=True, slots=True)
class RegisteredSaver:
    """A saver, as `register_checkpoint_saver` was given it; `name` is the full name."""

    name: str
    predicate: Callable[[Any], bool]
    save_fn: SaveFn
    restore_fn: RestoreFn
    strict_predicate_restore: bool = True


_savers: dict[str, RegisteredSaver] = {}  # in the order of registration


def register_checkpoint_saver(
    package: str = "Custom",
    name: str | None = None,
    predicate: Callable[[Any], bool] | None = None,
    save_fn: SaveFn | None = None,
    restore_fn: RestoreFn | None = None,
    strict_predicate_restore: bool = True,
) -> None:
    """Registers functions that save and restore the objects that a predicate accepts.

    Args:
      package, name: the saver is known as "package.name", in checkpoints too.
      predicate: is called with every object of the graph: trackables, Flax objects, containers,
        leaves, and objects of unknown kinds that are elements of containers or are given to a
        `Checkpoint` by name.
      save_fn: `(objects by name, file_prefix)`; writes shards with `ckpt.io.write_shard` at
        paths that begin with `file_prefix`, and returns None, a shard or a list of shards. If
        there are several processes, it is called on each of them with another prefix, and has to
        write another slice on each. A jax.Array is written so. A numpy array is to be written by
        the process with `jax.process_index() == 0` alone, or in parts, with `ckpt.io.Slice`.
      restore_fn: `(objects by name, merged_prefix)`; reads with `ckpt.io.read_slices`. It
        assigns in place and returns None, or returns new values by name for immutable objects.
        It is called on each process.
      strict_predicate_restore: whether it is an error to restore into an object that the
        predicate refuses. If it is not, the object is skipped and keeps its value.

    Raises:
      TypeError: an argument is of the wrong kind.
      RegistrationError: the name is taken, or has characters that are not letters, digits, ".",
        "_" or "-".

    Source: `tf.train.experimental`'s register_checkpoint_saver.

    Example:
      >>> class Table:
      ...     rows = None
      >>> with registration_scope():
      ...     register_checkpoint_saver(
      ...         name="Table", predicate=lambda obj: isinstance(obj, Table),
      ...         save_fn=lambda objects, prefix: None, restore_fn=lambda objects, prefix: None)
      ...     saver_name(Table())
      'Custom.Table'
    """
    full = _full_name(package, name, "checkpoint saver")
    for argument, value in (
        ("predicate", predicate),
        ("save_fn", save_fn),
        ("restore_fn", restore_fn),
    ):
        if not callable(value):
            raise TypeError(f"{argument} of the checkpoint saver {full!r} must be callable")
    if full in _savers:
        raise RegistrationError(f"a checkpoint saver named {full!r} is already registered")
    assert predicate and save_fn and restore_fn
    _savers[full] = RegisteredSaver(full, predicate, save_fn, restore_fn, strict_predicate_restore)


def saver_name(obj: Any) -> str | None:
    """The newest saver that takes `obj`; None for the default saver.

    A `PythonState` always saves itself, even if a predicate accepts it.
    """
    if isinstance(obj, PythonState):
        return None
    for saver in reversed(_savers.values()):
        if saver.predicate(obj):
            return saver.name
    return None


@dataclass(frozen=True, slots=True)
class IsExactly:
    """The predicate that accepts objects of one type, not of its subclasses."""

    kind: type

    def __call__(self, obj: Any) -> bool:
        return type(obj) is self.kind


@dataclass(frozen=True, slots=True)
class ByType:
    """A predicate that says the same of all objects of a type."""

    test: Callable[[Any], bool]

    def __call__(self, obj: Any) -> bool:
        return self.test(obj)


def saver_of() -> Callable[[Any], str | None]:
    """`saver_name`, as a function that needs one lookup if all predicates look at types alone."""
    if not all(isinstance(saver.predicate, IsExactly | ByType) for saver in _savers.values()):
        return saver_name
    names: dict[type, str | None] = {}

    def name(obj: Any) -> str | None:
        kind = type(obj)
        if kind not in names:
            names[kind] = saver_name(obj)
        return names[kind]

    return name


def get_saver(name: str) -> RegisteredSaver:
    """The saver that a checkpoint names.

    Raises:
      RegistrationError: no saver of that name is registered.
    """
    try:
        return _savers[name]
    except KeyError:
        raise RegistrationError(
            f"the checkpoint saver cannot be found: {name!r} is not registered; import the module "
            f"that registers it first (registered now: {sorted(_savers) or 'none'})"
        ) from None


def has_saver(name: str) -> bool:
    """Whether a saver of that name is registered."""
    return name in _savers


def unregister_checkpoint_saver(name: str) -> None:
    """Forgets a saver, as if nobody had registered it."""
    del _savers[get_saver(name).name]


_other_registries: list[list[Any]] = []


def undone_with_registrations(registry: list[Any]) -> None:
    """Lets `registration_scope` undo what is added to a list as well."""
    _other_registries.append(registry)


@contextlib.contextmanager
def registration_scope() -> Iterator[None]:
    """Undoes, on leaving, the registrations of savers, classes, views and formats made inside."""
    savers, classes = dict(_savers), dict(_classes)
    others = [list(registry) for registry in _other_registries]
    try:
        with view_registration_scope():
            yield
    finally:
        for registry, before in zip(_other_registries, others, strict=True):
            registry[:] = before
        _savers.clear()
        _savers.update(savers)
        _classes.clear()
        _classes.update(classes)


# --- classes ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RegisteredClass:
    """A class, as `register_serializable` was given it; `name` is the full name."""

    name: str
    cls: type
    predicate: Callable[[Any], bool]


_classes: dict[str, RegisteredClass] = {}


def register_serializable(
    package: str = "Custom",
    name: str | None = None,
    predicate: Callable[[Any], bool] | None = None,
) -> Callable[[C], C]:
    """Class decorator: gives a class the name under which checkpoints know it.

    Args:
      package, name: the class is known as "package.name". By default, `name` is its own name.
      predicate: which objects are of this class; `isinstance` by default.

    `ckpt.load_object` recreates objects of registered classes through methods that they may
    have: `_serialize_to_proto()`, `_deserialization_dependencies(children)`, the class method
    `_deserialize_from_proto(proto, dependencies)`, and `_add_trackable_child(name, value)`.

    Source: TensorFlow's `tf.__internal__.saved_model` register_serializable.

    Example:
      >>> with registration_scope():
      ...     @register_serializable()
      ...     class Model: ...
      ...     registered_name(Model())
      'Custom.Model'
    """

    def decorate(cls: C) -> C:
        if not isinstance(cls, type):
            raise TypeError(f"register_serializable decorates classes, got {cls!r}")
        full = _full_name(package, name or cls.__name__, "class")
        if predicate is not None and not callable(predicate):
            raise TypeError(f"predicate of the class {full!r} must be callable")
        if full in _classes:
            raise RegistrationError(f"a class named {full!r} is already registered")
        _classes[full] = RegisteredClass(full, cls, predicate or (lambda obj: isinstance(obj, cls)))
        return cls

    return decorate


def registered_name(obj: Any) -> str | None:
    """The name of the newest registered class that `obj` belongs to; None if there is none."""
    for entry in reversed(_classes.values()):
        if entry.predicate(obj):
            return entry.name
    return None


def registered_class(name: str) -> type | None:
    """The class that is registered as `name`; None if there is none."""
    entry = _classes.get(name)
    return entry.cls if entry else None


def _full_name(package: str, name: str | None, what: str) -> str:
    if not isinstance(package, str) or not isinstance(name, str):
        raise TypeError(
            f"the package and name of a {what} must be strings, got {package!r} and {name!r}"
        )
    full = f"{package}.{name}"
    if not _NAME.fullmatch(full) or full == "..":  # it becomes part of file names
        raise RegistrationError(
            f"Invalid registered {what} name {full!r}: use letters, digits, '.', '_' and '-'"
        )
    return full
