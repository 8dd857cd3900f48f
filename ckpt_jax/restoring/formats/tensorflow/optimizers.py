"""Optimizers of TensorFlow and Keras, so that an optax state can go on with what they saved.

Three generations of them keep the same numbers in different places. The oldest (`tf.compat.v1`, and
Keras up to 2.10) have *slots*: edges of the optimizer that are labelled with a variable and a name,
"m" and "v" for Adam. From Keras 2.11 on, an optimizer has a list for each name, `_momentums` and
`_velocities`, with one element for each variable. Keras 3 also saves which variables these are
(`_trainable_variables`). In Keras 2 only the names of the elements say so: "Adam/m/dense/kernel".

`with_slots` adds slots for the elements of such lists, by the names that the oldest generation has
for them. So they follow their variables: if a rename rule moves or transposes a variable, its
moments come along. Nothing is taken away.

`as_optax` gives slots and counters the names that they have in the optax state of the program, for
the optimizers that have a counterpart in optax. Most numbers are the same. A momentum is not:
Keras's contains the learning rate and the sign of the step, and optax's does not.

Only optimizers of unknown class are looked at. Those of this library's checkpoints have one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ckpt_jax.graph.boxes import Box
from ckpt_jax.graph.nodes import Node, ObjectGraph, Slot, object_keys
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.formulas import Derivation, Derived, Formula, Operation, Source, made
from ckpt_jax.restoring.rename import Renamed
from ckpt_jax.restoring.transforms import Cast

_VARIABLES = "_trainable_variables"
_COUNTERS = ("_iterations", "iter")
_LEARNING_RATES = ("_learning_rate", "learning_rate")
_MAX_SCOPES = 32  # names of optimizers and slots before the name of a variable
_DECAY = "decay"  # of the learning rate, in the oldest generation


# --- slots -----------------------------------------------------------------------------

# A list that tells the kind of optimizer, and the names of the slots for the lists of this kind.
_KINDS: tuple[tuple[str, Mapping[str, str]], ...] = (
    (
        "_average_gradients",
        {"_velocities": "rms", "_momentums": "momentum", "_average_gradients": "mg"},
    ),
    ("_linears", {"_accumulators": "accumulator", "_linears": "linear"}),
    ("_u", {"_m": "m", "_u": "v"}),
    ("_velocities", {"_momentums": "m", "_velocities": "v", "_velocity_hats": "vhat"}),
    ("_accumulators", {"_accumulators": "accumulator"}),
    (
        "_accumulated_grads",
        {"_accumulated_grads": "accum_grad", "_accumulated_delta_vars": "accum_var"},
    ),
    ("_momentums", {"_momentums": "m"}),  # Lion
    ("momentums", {"momentums": "momentum"}),
)
_LION = "Lion/"  # its list has the name of that of SGD in Keras 2


def with_slots(graph: ObjectGraph) -> ObjectGraph:
    """The graph, with slots for optimizers that keep the state of their variables in lists."""
    found: dict[int, list[Slot]] = {}
    by_name: dict[str, int | None] | None = None
    for number, node in enumerate(graph.nodes):
        if node.type_name or node.slots or not node.children:
            continue
        children = {str(label): child for label, child in node.children}
        names = next((names for kind, names in _KINDS if kind in children), {})
        if _COUNTERS[0] not in children or not names:
            continue
        variables = _elements(graph, children.get(_VARIABLES))
        if variables is None and by_name is None:
            by_name = _variables_by_name(graph)
        for label, name in names.items():
            elements = _elements(graph, children.get(label))
            if not elements:
                continue
            if graph.nodes[elements[0]].attributes[0].full_name.startswith(_LION):
                name = "m"
            if variables is None:
                owners = [_variable_of(graph, element, by_name or {}) for element in elements]
            else:
                owners = variables if len(variables) == len(elements) else []
            found.setdefault(number, []).extend(
                Slot(owner, name, element)
                for owner, element in zip(owners, elements, strict=False)
                if owner is not None and _shape(graph, owner) == _shape(graph, element)
            )
    if not found:
        return graph
    nodes = list(graph.nodes)
    for number, slots in found.items():
        nodes[number] = replace(nodes[number], slots=tuple(slots))
    return replace(graph, nodes=tuple(nodes))


def _elements(graph: ObjectGraph, node: int | None) -> list[int] | None:
    """The nodes in a list of values; None if there is no such list."""
    if node is None or graph.nodes[node].attributes:
        return None
    elements = [child for _, child in graph.nodes[node].children]
    labels = [label for label, _ in graph.nodes[node].children]
    is_list = labels == [*range(len(labels))]
    return elements if is_list and all(graph.nodes[i].attributes for i in elements) else None


def _shape(graph: ObjectGraph, node: int) -> tuple[int, ...]:
    return graph.nodes[node].attributes[0].spec.shape


def _variables_by_name(graph: ObjectGraph) -> dict[str, int | None]:
    """Values by the name that their variable had in TensorFlow; None if several have a name."""
    found: dict[str, int | None] = {}
    for node, attribute in graph.attributes():
        name = attribute.full_name
        if name:
            found[name] = None if found.get(name, node) != node else node
    return found


def _variable_of(graph: ObjectGraph, element: int, by_name: Mapping[str, int | None]) -> int | None:
    """The variable that an element belongs to by its name: "Adam/m/dense/kernel"."""
    name = graph.nodes[element].attributes[0].full_name
    for _ in range(min(name.count("/"), _MAX_SCOPES)):
        name = name.partition("/")[2]
        if name in by_name:
            return by_name[name]
    return None


# --- optax -----------------------------------------------------------------------------

_COUNT = re.compile(r"\w+\.count(#\d+)?")
_HYPERPARAMETER = re.compile(r"\w+\.hyperparams\.learning_rate")

_SAME, _NEGATIVE, _BY_RATE = "same", "negative", "by rate"  # how a number differs in optax

_ADAM = ("ScaleByAdamState", "ScaleByAmsgradState")
_RMS = ("ScaleByRmsState", "ScaleByRStdDevState")
_RMS_CORRECTED = ("ScaleByRmsWithCountState", "ScaleByRStdDevWithCountState")
_FIRST = tuple([f"{state}.mu" for state in _ADAM])
_SECOND = tuple([f"{state}.nu" for state in _ADAM])
_SQUARES = tuple([f"{state}.nu" for state in (*_RMS, *_RMS_CORRECTED)])
_MEANS = tuple([f"{state}.mu" for state in (*_RMS, *_RMS_CORRECTED)])
_TRACE = ("TraceState.trace",)


def as_optax(
    renamed: Renamed,
    live: ObjectGraph,
    bound: Mapping[int, int],
    number: Callable[[str], float],
) -> Renamed:
    """A graph with the state of each optimizer under the names that optax has for it.

    Args:
      renamed: the saved graph, after `with_slots` and rename rules.
      live: the graph of the program's objects.
      bound: saved node -> live node, as far as they match.
      number: reads a stored number, by key.

    Returns:
      The graph, with the same nodes and keys, and derivations of values that are converted. Its
      notes say of what looks as if it had a counterpart why it has none.
    """
    saved = renamed.graph
    optimizers = [
        (source, target)
        for source, target in bound.items()
        if target >= 0 and _is_optimizer(saved.nodes[source])
    ]
    if not optimizers:
        return renamed
    work = _Translation([*saved.nodes], dict(renamed.derived), number)
    owners = _train_states(live)
    by_live = {target: source for source, target in bound.items()}
    for source, target in optimizers:
        work.translate(source, live.nodes[target])
        if (owner := by_live.get(owners.get(target, -1))) is not None:
            work.add_numbers(owner, source, ["step"])
    notes = {**renamed.notes, **work.notes}
    if not work.changed:
        return replace(renamed, notes=notes)
    graph = replace(saved, nodes=tuple(work.nodes), object_keys=object_keys(work.nodes))
    return replace(renamed, graph=graph, derived=work.derived, notes=notes)


def _train_states(live: ObjectGraph) -> dict[int, int]:
    """Train states, which count steps beside the state of their optimizer, by that state."""
    return {
        children["opt_state"]: number
        for number, node in enumerate(live.nodes)
        if {"opt_state", "step"} <= (children := dict(node.children)).keys()
    }


def _is_optimizer(node: Node) -> bool:
    if node.type_name:
        return False
    return bool(node.slots) or any(label in _COUNTERS for label, _ in node.children)


def _is_optax(node: Node, names: Iterable[str]) -> bool:
    """Whether a node of the program has an optax state, by the names of its values."""
    is_module = node.type_name.rpartition(".")[2].endswith("Optimizer")  # a state may be empty
    return is_module or any("State." in name for name in names)


class _Translation:
    """A graph whose optimizers are being translated."""

    def __init__(
        self, nodes: list[Node], derived: dict[str, Derivation], number: Callable[[str], float]
    ):
        self.nodes = nodes
        self.derived = derived
        self.notes: dict[int, str] = {}
        self.changed = False
        self._number = number

    def translate(self, source: int, ours: Node) -> None:
        """Translates the state of one optimizer, as far as the program's has a place for it."""
        known = {slot.name for slot in ours.slots}
        labels = [str(label) for label, _ in ours.children]
        if not _is_optax(ours, {*known, *labels}):
            return
        theirs = self.nodes[source]
        children = {str(label): child for label, child in theirs.children}
        self.note(theirs, children)
        self.add_numbers(source, source, labels)
        theirs = self.nodes[source]
        names: dict[str, str] = {}
        for name, (fields, change) in _counterparts(theirs).items():
            field = next((field for field in fields if field in known), None)
            if field is not None and name not in known:
                nodes = [slot.node for slot in theirs.slots if slot.name == name]
                if self.convert(nodes, change, children):
                    names[name] = field
        if names:
            self.changed = True
            slots = [replace(slot, name=names.get(slot.name, slot.name)) for slot in theirs.slots]
            self.nodes[source] = replace(theirs, slots=tuple(slots))

    def note(self, theirs: Node, children: Mapping[str, int]) -> None:
        """Notes for what optax has no counterpart of."""
        found = [*children.items(), *[(slot.name, slot.node) for slot in theirs.slots]]
        self.notes.update({node: _NOTES[name] for name, node in found if name in _NOTES})

    def add_numbers(self, node: int, optimizer: int, labels: Sequence[str]) -> None:
        """Adds edges to the counter and the learning rate of an optimizer.

        Args:
          node: gets the edges, as far as it has none of these labels.
          optimizer: has the numbers.
          labels: what the program calls its numbers.
        """
        own = {str(label): child for label, child in self.nodes[optimizer].children}
        counter = next((own[n] for n in _COUNTERS if n in own and self.is_number(own[n])), None)
        rate = next((own[n] for n in _LEARNING_RATES if n in own and self.is_number(own[n])), None)
        taken = {str(label) for label, _ in self.nodes[node].children}
        counts, rates = [], []
        if counter is not None:
            counts = [n for n in labels if n not in taken and (n == "step" or _COUNT.fullmatch(n))]
        if rate is not None:
            rates = [n for n in labels if n not in taken and _HYPERPARAMETER.fullmatch(n)]
        if counter is not None and counts:
            self.derive(counter, Cast())
        edges = [*[(name, counter) for name in counts], *[(name, rate) for name in rates]]
        if edges:
            self.changed = True
            children = (*self.nodes[node].children, *edges)
            self.nodes[node] = replace(self.nodes[node], children=children)

    def convert(self, nodes: Sequence[int], change: str, children: Mapping[str, int]) -> bool:
        """Makes the numbers of slot variables those of optax; whether this is possible."""
        if change == _SAME:
            return True
        divisor = -1.0 if change == _NEGATIVE else self.rate(children)
        if divisor is None:
            self.notes.update(dict.fromkeys(nodes, _NO_RATE))
            return False
        for node in nodes:
            self.derive(node, Divided(divisor))
        return True

    def rate(self, children: Mapping[str, int]) -> float | None:
        """The learning rate, negated; None if it is not stored, or was not always the same."""
        found = [self.value(children[name]) for name in _LEARNING_RATES if name in children]
        decay = self.value(children[_DECAY]) if _DECAY in children else 0.0
        if not found or found[0] is None or not found[0] or decay:
            return None
        return -found[0]

    def value(self, node: int) -> float | None:
        if not self.is_number(node) or self.nodes[node].attributes[0].spec.shape:
            return None
        key = self.nodes[node].attributes[0].key
        return None if key in self.derived else self._number(key)

    def is_number(self, node: int) -> bool:
        """Whether a node has one value, which is a number or an array of numbers."""
        specs = [attribute.spec for attribute in self.nodes[node].attributes]
        return len(specs) == 1 and specs[0].is_array and not specs[0].is_bytes

    def derive(self, node: int, step: Operation) -> None:
        """Lets a step change the value of a node."""
        if not self.is_number(node):
            return  # it will not fit what it is read for
        (attribute,) = self.nodes[node].attributes
        known = self.derived.get(attribute.key)
        if known is None:
            before: Formula = Source(attribute.key, attribute.spec)
        elif isinstance(known, Derived):
            before = known.formula
        else:
            return  # an adapter makes the value
        formula = made(step, before)
        self.derived[attribute.key] = Derived(formula)
        attributes = (replace(attribute, spec=formula.spec),)
        self.nodes[node] = replace(self.nodes[node], attributes=attributes)


_MAXIMUM = "optax.amsgrad takes its maximum after the bias correction, Keras takes it before"
_SCHEDULE = "Nadam of Keras has a schedule for its momentum, that of optax has none"
_POWER = "TensorFlow 1 saves powers of decay rates instead of the count; set the count yourself"
_NOTES = {
    "vhat": _MAXIMUM,
    "_u_product": _SCHEDULE,
    "momentum_cache": _SCHEDULE,
    "beta1_power": _POWER,
    "beta2_power": _POWER,
}
_NO_RATE = (
    "Keras's momentum contains the learning rate, and optax's does not. The checkpoint does not "
    "say what the learning rate was, or it changed. Give the momentum a rule that divides it by "
    "-learning_rate"
)


def _counterparts(node: Node) -> dict[str, tuple[tuple[str, ...], str]]:
    """For each slot of an optimizer: fields of optax states that it corresponds to, and how."""
    names = {slot.name for slot in node.slots}
    found: dict[str, tuple[tuple[str, ...], str]] = {}

    def pair(own: Iterable[str], fields: tuple[str, ...], change: str = _SAME) -> None:
        found.update({name: (fields, change) for name in own if name in names})

    if "linear" in names:  # FTRL
        return {}
    if "rms" in names:
        pair(["rms"], _SQUARES)
        pair(["mg"], _MEANS)
        pair(["momentum"], _TRACE, _NEGATIVE)
    elif "v" in names:
        pair(["m"], _FIRST)
        pair(["v"], _SECOND)
    else:
        is_keras = any(label in _COUNTERS for label, _ in node.children)
        pair(["m"], ("ScaleByLionState.mu",))
        pair(["momentum"], _TRACE, _BY_RATE if is_keras else _SAME)
        pair(["accumulator"], ("ScaleByRssState.sum_of_squares",))
        pair(["accum_grad", "accum"], ("ScaleByAdaDeltaState.e_g",))
        pair(["accum_var", "accum_update"], ("ScaleByAdaDeltaState.e_x",))
    return found


@dataclass(frozen=True, slots=True)
class Divided(Operation):
    """Divides floating-point numbers by a constant."""

    by: float

    def spec(self, specs: Sequence[LeafSpec]) -> LeafSpec:
        (spec,) = specs
        return spec

    def pull(self, box: Box, specs: Sequence[LeafSpec]) -> Sequence[Box]:
        return [box]

    def apply(
        self, box: Box, parts: Sequence[np.ndarray | None], specs: Sequence[LeafSpec]
    ) -> np.ndarray:
        (part,) = parts
        assert part is not None
        return np.asarray(part / np.asarray(self.by, part.dtype))


# --- the way back ----------------------------------------------------------------------

_SLOTS: Mapping[str, Mapping[str, str]] = {
    "ScaleByAdamState": {"mu": "m", "nu": "v"},
    "ScaleByAmsgradState": {"mu": "m", "nu": "v"},
    "ScaleByRmsState": {"nu": "rms"},
    "ScaleByRStdDevState": {"mu": "mg", "nu": "rms"},
    "ScaleByRssState": {"sum_of_squares": "accumulator"},
    "ScaleByAdaDeltaState": {"e_g": "accum_grad", "e_x": "accum_var"},
}


@dataclass(frozen=True, slots=True)
class ForTensorFlow:
    """A graph with the names that TensorFlow has for the state of optimizers.

    Attributes:
      graph: node ids and keys are as before.
      negated: keys of values whose sign differs in TensorFlow.
    """

    graph: ObjectGraph
    negated: frozenset[str]


def as_tensorflow(graph: ObjectGraph) -> ForTensorFlow:
    """The inverse of `as_optax`, as far as the oldest generation has a place for what optax has.

    The momentum of SGD keeps its name. It would have to be multiplied by the learning rate, which
    optax does not save.
    """
    nodes = list(graph.nodes)
    negated: set[str] = set()
    for number, node in enumerate(graph.nodes):
        states = {slot.name.partition(".")[0] for slot in node.slots} & _SLOTS.keys()
        if len(states) != 1:
            continue
        (state,) = states
        names = {f"{state}.{field}": name for field, name in _SLOTS[state].items()}
        if "rms" in names.values():
            names["TraceState.trace"] = "momentum"
            traces = [slot.node for slot in node.slots if slot.name == "TraceState.trace"]
            negated.update(a.key for trace in traces for a in nodes[trace].attributes)
        slots = [replace(slot, name=names.get(slot.name, slot.name)) for slot in node.slots]
        nodes[number] = replace(node, slots=tuple(slots))
        _rename_numbers(nodes, number, f"{state}.count")
    return ForTensorFlow(
        ObjectGraph(tuple(nodes), object_keys(nodes), graph.named), frozenset(negated)
    )


def _rename_numbers(nodes: list[Node], optimizer: int, count: str) -> None:
    """Gives counter and learning rate of an optimizer TensorFlow's names; the counter is int64."""
    node = nodes[optimizer]
    children = {str(label): child for label, child in node.children}
    counter = next((name for name in (count, "step") if name in children), None)
    labels = {name: "learning_rate" for name in children if _HYPERPARAMETER.fullmatch(name)}
    if counter is not None:
        labels[counter] = "iter"
        child = nodes[children[counter]]
        wide = [replace(a, spec=replace(a.spec, dtype="int64")) for a in child.attributes]
        nodes[children[counter]] = replace(child, attributes=tuple(wide))
    edges = [(labels.get(str(label), label), child) for label, child in node.children]
    if len({label for label, _ in edges}) == len(edges):
        nodes[optimizer] = replace(node, children=tuple(edges))
