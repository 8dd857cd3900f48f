"""Positions: optimizer states of files that know nothing of optimizers.

Flax and Orbax write the state of an optimizer as the optimizer's library nests it: the first moment
of `params/w` is `opt_state/0/mu/w`. A program's optimizer has it as the slot `ScaleByAdamState.mu`
of `params/w` instead, wherever it is nested. The program's own state says which position means
which slot. So a state in a file becomes slots, too, and from there on a moment follows its
parameter, as everywhere.

The states that an optimizer consists of are looked for at their positions, and if they are not
there, by the names of their fields. So moments survive if transforms are added or removed.

A rename rule moves a parameter, but not its moments, which still lie under the old name of the
parameter. So both names are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckpt_jax.graph.global_names import BOX
from ckpt_jax.graph.labels import VARIABLE_VALUE, Label, attribute_key, local_name
from ckpt_jax.graph.nodes import Attribute, Node, ObjectGraph, Slot, descendants, object_keys
from ckpt_jax.matching.trace import LiveGraph
from ckpt_jax.objects.views import OptimizerView, ParameterPath, StatePlace
from ckpt_jax.restoring.formulas import Derivation, Derived, Source
from ckpt_jax.restoring.rename import Renamed


def slots_of_positions(
    renamed: Renamed, live: LiveGraph, bound: Mapping[int, int], original: ObjectGraph
) -> Renamed:
    """A graph of names, with states of optimizers as the slots and children that the program has.

    If a rule derives a parameter, its moments are derived in the same way.

    Args:
      renamed: the graph of names, after rules were applied.
      live: the program's objects.
      bound: saved node -> live node, as far as they match.
      original: the graph before rules were applied.
    """
    saved = renamed.graph
    optimizers = [
        (source, target)
        for source, target in bound.items()
        if target >= 0
        and isinstance(live.views[target], OptimizerView)
        and saved.nodes[source].children
        and not saved.nodes[source].slots
    ]
    if not optimizers:
        return renamed
    made = _Made(renamed, original)
    for source, target in optimizers:
        children, slots = _optimizer(made, source, live, target, bound)
        made.nodes[source] = replace(saved.nodes[source], children=children, slots=slots)
    return made.finish()


class _Made:
    """A graph that is being changed: nodes are replaced and added."""

    def __init__(self, renamed: Renamed, original: ObjectGraph):
        self.renamed, self.saved = renamed, renamed.graph
        self.nodes = list(renamed.graph.nodes)
        self.saved_paths: dict[int, str] = {}
        self.derived: dict[str, Derivation] = {}
        self.path_of_key = {
            attribute.key: original.value_path(node, attribute.name)
            for node, attribute in original.attributes()
        }

    def finish(self) -> Renamed:
        """The changed graph."""
        nodes = tuple(self.nodes)
        if nodes == self.saved.nodes:
            return self.renamed
        return replace(
            self.renamed,
            graph=ObjectGraph(nodes, object_keys(nodes), self.saved.named),
            saved_paths={**self.renamed.saved_paths, **self.saved_paths},
            derived={**self.renamed.derived, **self.derived},
        )

    def moment(self, tree: int, variable: ParameterPath, origin: int) -> tuple[int, set[int]]:
        """The slot variable of a parameter in a tree that mirrors the parameters.

        Args:
          tree: where the tree begins.
          variable: the parameter, as the program calls it.
          origin: the node of the parameter.

        Returns:
          Its node, and the nodes whose values it takes. The latter are none if it is not there.
        """
        attribute = self.saved.nodes[origin].attributes[0]
        derivation = self.renamed.derived.get(attribute.key)
        if not isinstance(derivation, Derived):
            names = _suffixes(self.path_of_key.get(attribute.key, ""))
            node = _value_in(self.saved, tree, [variable.steps, *names])
            return (-1, set()) if node is None else (node, {node})
        names = [_suffixes(self.path_of_key.get(key, "")) for key in derivation.keys]
        found = [_value_in(self.saved, tree, suffixes) for suffixes in names]
        sources = [node for node in found if node is not None]
        if len(sources) < len(found):
            return -1, set()
        values = [self.saved.nodes[node].attributes[0] for node in sources]
        slots = [Source(value.key, value.spec) for value in values]
        try:
            made = derivation.of_slots(dict(zip(derivation.keys, slots, strict=True)))
        except ValueError:  # of another shape than the parameter, as moments of Adafactor are
            return -1, set()
        node = len(self.nodes)
        key = attribute_key(f".DERIVED/{node}", VARIABLE_VALUE)
        self.derived[key] = made
        self.nodes.append(Node("leaf", attributes=(Attribute(VARIABLE_VALUE, key, made.spec),)))
        more = " ..." if len(sources) > 1 else ""
        self.saved_paths[node] = self.path_of_key[values[0].key] + more
        for source in sources:
            self.nodes[source] = replace(self.nodes[source], attributes=())
        return node, {*sources}


def _optimizer(
    made: _Made, source: int, live: LiveGraph, target: int, bound: Mapping[int, int]
) -> tuple[tuple[tuple[Label, int], ...], tuple[Slot, ...]]:
    """The children and slots of one optimizer."""
    saved = made.saved
    view, entry = live.views[target], live.graph.nodes[target]
    assert isinstance(view, OptimizerView)
    children = list(saved.nodes[source].children)
    wanted = {local_name(label) for label, _ in entry.children} - _labels(saved, source)
    sources = {node: origin for origin, node in bound.items()}
    origins = {
        (slot.name, live.variables[slot.node]): sources[slot.variable]
        for slot in entry.slots
        if slot.node in live.variables
        and slot.variable in sources
        and saved.nodes[sources[slot.variable]].attributes
    }
    added: list[tuple[Label, int]] = []
    slots: list[Slot] = []
    taken: list[int] = []
    places = [*view.places(live.objects[target])]
    structs = _structs(saved, source, places)
    for place in places:
        struct, field = _struct_of(place)
        tree = _below(saved, structs[struct], (field,)) if struct in structs else None
        if tree is None:
            continue
        name, variable = place.name, place.variable
        if name in wanted:  # a child, or all slots of a name if parameters are no nodes
            added.append((name, tree))
            taken.append(tree)
            wanted.discard(name)
        elif variable is not None and (origin := origins.get((name, variable))) is not None:
            node, values = made.moment(tree, variable, origin)
            if values:
                slots.append(Slot(origin, name, node))
                taken += values
    kept = [edge for edge in children if not taken or not _is_used(saved.nodes, edge[1], {*taken})]
    return (*kept, *added), tuple(slots)


Struct = tuple[Label, ...]  # the path from an optimizer to one of the states that it consists of


def _struct_of(place: StatePlace) -> tuple[Struct, Label]:
    """The state that a value is a field of, and the field."""
    within = len(place.variable.steps) if place.variable is not None else 0
    above = place.steps[: len(place.steps) - within]
    return above[:-1], above[-1] if above else ""


def _structs(saved: ObjectGraph, optimizer: int, places: Sequence[StatePlace]) -> dict[Struct, int]:
    """The saved node of each state that an optimizer consists of.

    It is the one at the same position. If that one has other fields, it is the only one that has
    the same fields, so that moments are also found if transforms were added or removed.
    """
    fields: dict[Struct, set[str]] = {}
    for place in places:
        struct, field = _struct_of(place)
        fields.setdefault(struct, set()).add(local_name(field))
    found: dict[Struct, int] = {}
    for struct, names in fields.items():
        node = _below(saved, optimizer, struct)
        if node is not None and names <= _labels(saved, node):
            found[struct] = node
    lost = [struct for struct in fields if struct not in found]
    if not lost:
        return found
    others: dict[frozenset[str], list[int]] = {}
    for node in descendants(saved.nodes, [optimizer]):
        if node not in found.values():
            others.setdefault(frozenset(_labels(saved, node)), []).append(node)
    for struct in lost:
        same = others.get(frozenset(fields[struct]), [])
        if len(same) == 1 and [fields[other] for other in lost].count(fields[struct]) == 1:
            found[struct] = same[0]
    return found


def _labels(saved: ObjectGraph, node: int) -> set[str]:
    return {local_name(label) for label, _ in saved.nodes[node].children}


def _below(saved: ObjectGraph, node: int, steps: Sequence[Label]) -> int | None:
    """The node at the end of a path; None if there is none."""
    for step in steps:
        name = local_name(step)
        children = saved.nodes[node].children
        found = [child for label, child in children if local_name(label) == name]
        if len(found) != 1:
            return None
        (node,) = found
    return node


def _suffixes(path: str) -> list[tuple[str, ...]]:
    """The parts of a path from each of them on."""
    parts = path.split("/")
    return [tuple(parts[start:]) for start in range(len(parts))]


def _value_in(saved: ObjectGraph, tree: int, names: Sequence[Sequence[Label]]) -> int | None:
    """The node in a tree that has a value and the first of some names; None if there is none."""
    for steps in names:
        for way in (steps, (*steps, BOX)):
            node = _below(saved, tree, way)
            if node is not None and saved.nodes[node].attributes:
                return node
    return None


def _is_used(nodes: Sequence[Node], node: int, taken: set[int]) -> bool:
    """Whether all values from a node on have become slots or children of their own."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        if node in taken:
            continue
        if nodes[node].attributes:
            return False
        below = {child for _, child in nodes[node].children} - seen
        seen |= below
        todo += below
    return True
