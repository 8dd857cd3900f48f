"""Recording: what each object of a program is, so that it can be made anew without the program.

An object of a registered class says so itself: in a message, and by naming the objects that have
to be there before it. Of anything else the view tells what it is, and its class is forgotten, so
it can have children and one value, and nothing of its own besides.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_jax.errors import UnsaveableError
from ckpt_jax.graph.labels import VARIABLE_VALUE
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph
from ckpt_jax.graph.plain import encode
from ckpt_jax.graph.saved_objects import (
    CONTAINERS,
    DICT,
    NONE,
    OBJECT,
    VALUE,
    VARIABLE,
    CyclicDependencyError,
    PlainPart,
    SavedObject,
    has_dtype_number,
    in_order,
    packed,
)
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects import registry
from ckpt_jax.objects.containers import Wrapper
from ckpt_jax.objects.state import PLAIN, NoDependency
from ckpt_jax.objects.trackable import AutoTrackable
from ckpt_jax.objects.views import View, view_of
from ckpt_jax.values.leaves import describe

TYPE_NAME = "_self_type_name"  # of the class that an object was of before it was made anew


def lasting(live: LiveGraph) -> LiveGraph:
    """A graph that says nothing that ends when its objects are made anew.

    Arrays lose their weak types then, and classes that are not registered are gone; an object
    remembers the name of the one that it was of.
    """

    def strong(attribute: Attribute) -> Attribute:
        return replace(attribute, spec=replace(attribute.spec, weak_type=False))

    nodes = [
        replace(
            node,
            type_name=getattr(obj, "__dict__", {}).get(TYPE_NAME, node.type_name),
            attributes=tuple([strong(a) if a.spec.weak_type else a for a in node.attributes]),
        )
        for node, obj in zip(live.graph.nodes, live.objects, strict=True)
    ]
    return replace(live, graph=ObjectGraph(tuple(nodes), live.graph.object_keys))


def recorded(live: LiveGraph) -> tuple[SavedObject, ...]:
    """The recipe by which `load` makes each node anew.

    Raises:
      UnsaveableError: naming every node that nothing could make anew.
    """
    node_of = {id(obj): node for node, obj in reversed([*enumerate(live.objects)])}
    problems: list[tuple[str, str]] = []
    objects: list[SavedObject] = []
    for node in range(len(live.objects)):
        try:
            objects.append(_recorded(live, node, node_of))
        except TypeError as error:
            problems.append((live.graph.paths[node], str(error)))
            objects.append(SavedObject(NONE))
    order: list[int] = []
    if not problems:
        try:
            order = in_order(live.graph, objects, range(len(objects)))
        except CyclicDependencyError as error:
            paths = " -> ".join(live.graph.paths[node] or "(root)" for node in error.cycle)
            problems.append((paths, "these depend on each other to be made anew"))
    for node in order:
        if objects[node].registered_name and hasattr(live.objects[node], "_serialize_to_proto"):
            written = live.objects[node]._serialize_to_proto()
            try:
                objects[node] = replace(objects[node], message=packed(written))
            except TypeError as error:
                problems.append((live.graph.paths[node], f"_serialize_to_proto: {error}"))
    if problems:
        lines = "\n".join(f"  {path or '(root)'}: {what}" for path, what in problems)
        raise UnsaveableError(
            f"{len(problems)} objects could not be made anew; nothing was written:\n{lines}\n"
            "ckpt.save and Checkpoint.save need no class to be registered.",
            tuple(problems),
        )
    return tuple(objects)


def _recorded(live: LiveGraph, node: int, node_of: Mapping[int, int]) -> SavedObject:
    obj, view, entry = live.objects[node], live.views[node], live.graph.nodes[node]
    if isinstance(obj, NoDependency):
        raise TypeError(
            "it is marked with ckpt.NoDependency, so nothing could take its place in the container "
            "that holds it; keep it in an attribute"
        )
    kind = _kind_of(view, entry)
    name = (registry.registered_name(obj) or "") if kind not in (VALUE, NONE) else ""
    if not name:
        _check_plain(obj, kind, entry)
    spec = None
    if entry.saver is not None and kind in (VALUE, VARIABLE):
        spec = _spec_for_saver(view.values(obj)[VARIABLE_VALUE], kind, entry.saver.name)
    return SavedObject(
        kind,
        name,
        dependencies=_dependencies(live, node, node_of) if name else (),
        spec=spec,
        plain_parts=_plain_parts(obj, entry) if isinstance(obj, Wrapper) else (),
    )


def _plain_parts(container: Wrapper, node: Node) -> tuple[PlainPart, ...]:
    """The elements of a list or dict of a trackable that are no state, and so no nodes."""
    states = {label for label, _ in node.children}
    parts: list[PlainPart] = []
    for position, (label, value) in enumerate(container._elements()):
        if label not in states:
            try:
                part = PlainPart(position, label, _plain(value))
                encode([list(part)])
            except RecursionError as error:
                raise TypeError(f"its element {label!r}: it is nested too deeply") from error
            except (TypeError, ValueError) as error:
                raise TypeError(f"its element {label!r}: {error}") from error
            parts.append(part)
    return tuple(parts)


def _plain(value: Any) -> Any:
    """An element as plain data; like `load_object`, it forgets classes."""
    view = view_of(value)
    if isinstance(value, (enum.Enum, *PLAIN)):
        return value
    if view is None or isinstance(value, NoDependency):
        raise TypeError(
            f"{type(value).__qualname__} is neither state nor plain data; register the class that "
            "holds it with ckpt.register_serializable and let it keep the element outside of this "
            "container"
        )
    if view.container == "leaf":
        raise TypeError(
            f"{type(value).__qualname__} is no state here, and no plain data that a list or dict "
            "of a trackable keeps; write it as a string"
        )
    parts = {at: _plain(part) for at, part in view.children(value)}
    if view.container in ("list", "tuple"):
        return list(parts.values()) if view.container == "list" else tuple(parts.values())
    return parts


def _kind_of(view: View, node: Node) -> str:
    container = view.container
    if not view.mutable and container == "leaf":
        return VALUE
    if container == "leaf" and not node.children:
        names = [attribute.name for attribute in node.attributes]
        return VARIABLE if node.saver or names == [VARIABLE_VALUE] else OBJECT
    if container in (NONE, *CONTAINERS):
        return container
    return OBJECT if view.mutable else DICT


def _check_plain(obj: Any, kind: str, node: Node) -> None:
    """Whether an object can do without its class."""
    what = None
    if node.attributes and kind not in (VALUE, VARIABLE):
        what = "values"
    elif node.slots:
        what = "slot variables"
    elif kind == OBJECT and node.saver is not None and _needs_class(node.saver.name):
        what = "its state"
    if what:
        cls = type(obj)
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__} keeps {what} in its own way; register the class "
            "with ckpt.register_serializable, so that it can make its objects anew"
        )
    if kind == OBJECT and (odd := [x for x, _ in node.children if not isinstance(x, str)]):
        raise TypeError(f"{odd[0]!r} is no name for an attribute")


def _needs_class(saver: str) -> bool:
    """Whether a saver is known to refuse what an object without a class is made anew as."""
    predicate = registry.get_saver(saver).predicate
    return isinstance(predicate, registry.ByType) and not predicate(AutoTrackable())


def _spec_for_saver(value: Any, kind: str, saver: str) -> LeafSpec:
    spec = describe(value)[0]
    known = spec.is_jax_array and has_dtype_number(spec.dtype)
    if not known and (kind == VARIABLE or not (spec.is_jax_array or spec.is_numpy_array)):
        raise TypeError(
            f"{spec} is held by the checkpoint saver {saver!r}, and cannot be made anew for it"
        )
    return replace(spec, weak_type=False)


def _dependencies(
    live: LiveGraph, node: int, node_of: Mapping[int, int]
) -> tuple[tuple[str, int], ...]:
    obj = live.objects[node]
    method = getattr(obj, "_deserialization_dependencies", None)
    if method is None:
        return ()
    children = dict(live.graph.nodes[node].children)
    named = method({label: live.objects[child] for label, child in children.items()})
    found: list[tuple[str, int]] = []
    for name, dependency in named.items():
        child = children.get(name)
        if child is None or live.objects[child] is not dependency:
            child = node_of.get(id(dependency))
        if child is None or not isinstance(name, str):
            raise TypeError(f"it depends on {name!r}, which is not in the object graph")
        found.append((name, child))
    return tuple(found)
