"""Plans and reports: what a match means for values."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_jax.graph.labels import SAVE_COUNTER, VARIABLE_VALUE
from ckpt_jax.graph.nodes import pretty_name, reachable
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.matching.assign import assign
from ckpt_jax.matching.match import match
from ckpt_jax.matching.plan import SaverCall, ValueRead, plan_read
from ckpt_jax.matching.trace import trace
from ckpt_jax.objects.trackable import PythonState, Trackable, Variable
from ckpt_jax.report import ReportEntry, RestoreReport, describe_problems

KINDS = ("missing", "unexpected", "mismatched", "deferred", "restored")


class Thing(Trackable):
    def __init__(self, **children):
        for name, child in children.items():
            self.track(name, child)


class Optimizer(Thing):
    def __init__(self, **children):
        super().__init__(**children)
        self.state = {}

    def slots(self):
        return self.state


class Position(PythonState):
    index = 0

    def serialize(self):
        return str(self.index)

    def deserialize(self, value):
        self.index = int(value)


class Several(Trackable):
    """An object with the values that a test gives it."""

    def __init__(self, **values):
        self.own = values

    def serialize_to_arrays(self):
        return self.own

    def restore_from_arrays(self, arrays):
        self.own = arrays


def describe(value):
    return LeafSpec(type(value).__name__), None


def fits(saved, target, value):
    return None if saved.kind == target.kind else f"expected {target.kind}, got {saved.kind}"


def planned(saved, live, **kwargs):
    """The plan for restoring what was traced from one object into another."""
    saved = trace(saved, describe, kwargs.pop("saved_saver", lambda obj: None)).graph
    live = trace(live, describe, kwargs.pop("live_saver", lambda obj: None))
    return plan_read(saved, live, match(saved, live.graph), path="ckpt-1", fits=fits, **kwargs)


def paths(report):
    """The paths of a report by kind, without the kinds that are empty."""
    by_kind = {kind: {entry.path for entry in getattr(report, kind)} for kind in KINDS}
    return {kind: found for kind, found in by_kind.items() if found}


LEAVES = st.sampled_from([1, 2.5, "text", b"bytes"])


@st.composite
def trees(draw, mutable):
    """Nested children under few names: mutable objects, or plain containers, or both."""
    containers = [dict]
    if mutable:
        containers.append(lambda children: Thing(**children))
    names = st.sampled_from(["a", "b", "c"])
    wrap = st.sampled_from(containers)
    inner = st.recursive(
        LEAVES,
        lambda children: st.builds(
            lambda make, kids: make(kids), wrap, st.dictionaries(names, children, max_size=3)
        ),
        max_leaves=8,
    )
    kids = draw(st.dictionaries(names, inner, max_size=3))
    return Thing(**kids) if mutable else kids


# --- accounting -------------------------------------------------------------------------


def accounts(saved, live):
    """Checks that a report mentions every value of either side exactly once."""
    report = planned(saved, live).report
    saved_graph, live_graph = (trace(obj, describe).graph for obj in (saved, live))
    ours = [*report.restored, *report.missing, *report.mismatched]
    theirs = [*report.restored, *report.mismatched, *report.unexpected, *report.deferred]
    for graph, entries in ((live_graph, ours), (saved_graph, theirs)):
        values = [graph.value_path(node, a.name) for node, a in graph.attributes()]
        assert Counter(entry.path for entry in entries) == Counter(values)
    return report


@settings(max_examples=50)
@given(trees(mutable=False), trees(mutable=False))
def test_every_value_of_two_pytrees_appears_exactly_once(saved, live):
    report = accounts(saved, live)
    assert not report.deferred  # nothing appears later in an immutable container


@settings(max_examples=50)
@given(trees(mutable=True), trees(mutable=True))
def test_every_value_of_two_object_graphs_appears_exactly_once(saved, live):
    accounts(saved, live)


@settings(max_examples=50)
@given(trees(mutable=True))
def test_a_tree_restores_into_itself_exactly(tree):
    report = accounts(tree, tree)
    assert report.exact and not report.renamed


@settings(max_examples=50)
@given(trees(mutable=True), trees(mutable=True))
def test_there_is_one_read_for_each_restored_value(saved, live):
    plan = planned(saved, live)
    assert len(plan.reads) == len(plan.report.restored)
    live_graph = trace(live, describe).graph
    assert {live_graph.value_path(r.node, r.name) for r in plan.reads} == {
        entry.path for entry in plan.report.restored
    }


def test_each_kind_of_entry_says_what_was_expected_and_found():
    report = planned(
        {"same": 1, "kind": 1, "saved": 1.5}, {"same": 2, "kind": "x", "live": b"y"}
    ).report
    assert report.restored == (ReportEntry("same", "int", "int", "", "same"),)
    (mismatch,) = report.mismatched
    assert (mismatch.path, mismatch.expected, mismatch.found) == ("kind", "str", "int")
    assert mismatch.what == "expected str, got int"
    (missing,) = report.missing
    assert (missing.path, missing.expected, missing.found) == ("live", "bytes", "")
    (unexpected,) = report.unexpected
    assert (unexpected.path, unexpected.expected, unexpected.found) == ("saved", "", "float")


def test_what_may_still_come_is_deferred_and_what_cannot_come_is_unexpected():
    saved = Thing(later=Thing(v=1), box=(1, 2))
    report = planned(saved, Thing(box=(0,))).report
    assert paths(report) == {
        "deferred": {"later/v"},
        "unexpected": {"box/1"},
        "restored": {"box/0"},
    }


@pytest.mark.behaviour(29)
def test_a_value_of_a_bound_object_that_has_no_place_for_it_is_unexpected():
    report = planned(Thing(v1=Variable(1), v2=Variable(2)), Thing(v1=Thing(), v2=Variable(0)))
    assert paths(report.report) == {"unexpected": {"v1"}, "restored": {"v2"}}


def test_a_saved_value_that_two_leaves_take_is_restored_for_both():
    shared = Variable(1)
    plan = planned(Thing(a=shared, b=shared), Thing(a=Variable(0), b=Variable(0)))
    assert paths(plan.report) == {"restored": {"a", "b"}}
    assert {read.key for read in plan.reads} == {"a/.ATTRIBUTES/VARIABLE_VALUE"}


def test_python_state_and_the_one_value_of_a_variable_are_the_same_place():
    report = planned(Thing(p=Position()), Thing(p=Variable(1.0))).report
    assert paths(report) == {"mismatched": {"p"}}


def test_several_values_are_matched_by_name():
    plan = planned(Thing(t=Several(x=1, y=2)), Thing(t=Several(y=0, z=0)))
    assert paths(plan.report) == {
        "restored": {"t/y"},
        "mismatched": {"t/z"},  # it would be half restored
        "unexpected": {"t/x"},
    }
    assert [read.key for read in plan.reads] == ["t/.ATTRIBUTES/y"]


def test_a_read_goes_by_the_recorded_key_not_by_the_live_path():
    plan = planned({"0": 1}, [0])
    assert plan.reads == (
        ValueRead(
            1, VARIABLE_VALUE, "0/.ATTRIBUTES/VARIABLE_VALUE", LeafSpec("int"), LeafSpec("int"), 0
        ),
    )


def test_missing_values_name_the_nearest_saved_ones():
    report = planned({"dense": {"kernel": 1}}, {"dense": {"kernal": 1}}).report
    assert report.missing[0].nearest == ("dense/kernel",)
    assert "nearest: dense/kernel" in str(report)


def test_values_that_moved_are_listed_as_renamed():
    report = planned({"a": 1, "b": 2}, {"a": 0, "b": 0}, saved_paths={1: "old/a"}).report
    assert [(entry.path, entry.saved_path) for entry in report.renamed] == [("a", "old/a")]
    assert "a" in {entry.path for entry in report.restored}


# --- slots and a part of the program ----------------------------------------------------


def with_slot(value):
    variable, optimizer = Variable(value), Optimizer(rate=Variable(value))
    optimizer.state["m", variable] = Variable(value)
    return Thing(opt=optimizer, v=variable)


def test_slot_variables_are_values_like_others():
    slot = "opt/m/v"
    assert paths(planned(with_slot(1), with_slot(0)).report) == {
        "restored": {"opt/rate", "v", slot}
    }


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (with_slot(1), with_slot(0)),
        (with_slot(1), Thing(opt=Optimizer(rate=Variable(0)), v=Variable(0))),
        (Thing(opt=Optimizer(rate=Variable(0)), v=Variable(0)), with_slot(0)),
    ],
)
@pytest.mark.behaviour(310)
def test_slots_that_are_skipped_appear_on_neither_side(saved, live):
    report = planned(saved, live, skip_slots=True).report
    assert paths(report) == {"restored": {"opt/rate", "v"}}


def test_only_the_nodes_that_are_asked_for_are_planned():
    plan = planned({"a": 1, "b": 2}, {"a": 0, "b": 0}, only=frozenset([2]))
    assert [read.node for read in plan.reads] == [2]


# --- registered savers ------------------------------------------------------------------


def for_tables(obj):
    return "Custom.Table" if isinstance(obj, Several) else None


def test_a_registered_saver_is_called_once_with_all_its_objects_under_their_saved_names():
    saved, live = Thing(a=Several(x=1), b=Several(x=2)), Thing(b=Several(x=0), a=Several(x=0))
    plan = planned(saved, live, saved_saver=for_tables, live_saver=for_tables)
    assert plan.reads == ()
    assert plan.calls == (SaverCall("Custom.Table", {"a": 2, "b": 1}),)
    assert paths(plan.report) == {"restored": {"a", "b"}}


@pytest.mark.behaviour(304)
def test_an_object_that_moved_to_a_registered_saver_is_known_by_its_old_key():
    plan = planned(Thing(a=Several(x=1)), Thing(a=Several(x=0)), live_saver=for_tables)
    assert plan.calls == (SaverCall("Custom.Table", {"a/.ATTRIBUTES/x": 1}),)
    assert not plan.report.unexpected


# --- assign -----------------------------------------------------------------------------


def test_immutable_containers_are_rebuilt_and_what_did_not_change_is_kept():
    kept = {"y": 1}
    root = {"a": [1, (2, 3)], "b": kept}
    live = trace(root, describe)
    at = live.graph.paths.index("a/1/0")
    result = assign(live, {at: {VARIABLE_VALUE: 9}})
    assert result == {"a": [1, (9, 3)], "b": {"y": 1}}
    assert result["b"] is kept and root == {"a": [1, (2, 3)], "b": {"y": 1}}


def test_mutable_objects_stay_the_same_object():
    inner = Variable(1)
    root = {"v": inner}
    live = trace(root, describe)
    assert assign(live, {1: {VARIABLE_VALUE: 5}}) is root
    assert inner.value == 5


def test_nothing_to_assign_changes_nothing():
    root = [{"a": 1}]
    assert assign(trace(root, describe), {}) is root


@settings(max_examples=50)
@given(trees(mutable=False), st.data())
def test_values_that_are_assigned_are_found_by_the_next_trace(tree, data):
    live = trace(tree, describe)
    leaves = [node for node, _ in live.graph.attributes()]
    chosen = data.draw(st.sets(st.sampled_from(leaves))) if leaves else set()
    again = trace(assign(live, {node: {VARIABLE_VALUE: -1} for node in chosen}), describe)
    assert again.graph.paths == live.graph.paths
    for node in leaves:
        expected = -1 if node in chosen else live.values[node][VARIABLE_VALUE]
        assert again.values[node] == {VARIABLE_VALUE: expected}


# --- names and tables -------------------------------------------------------------------


def test_pretty_names_are_those_of_tensorflow():
    graph = trace(with_slot(1), describe).graph
    names = [pretty_name(graph, node) for node in range(len(graph.nodes))]
    assert names == ["(root)", "(root).opt", "(root).v", "(root).opt.rate", names[-1]]
    assert names[-1] == "(root).opt's state 'm' for (root).v"


def test_what_can_be_reached_includes_slots_and_survives_cycles():
    root = with_slot(1)
    root.track("self", root)
    graph = trace(root, describe).graph
    assert reachable(graph, [0]) == set(range(len(graph.nodes)))
    variable = graph.paths.index("v")
    assert reachable(graph, [variable]) == {variable, len(graph.nodes) - 1}


def test_a_report_prints_its_problems_before_its_successes():
    report = planned({"a": 1, "b": 1}, {"a": 0, "b": "x"}).report
    lines = str(report).splitlines()
    assert lines[0] == ("ckpt-1: 1 mismatched, 0 missing, 0 unexpected, 0 deferred, 1 restored")
    assert [line.split()[:2] for line in lines[1:]] == [["mismatched", "b"], ["restored", "a"]]


def test_a_long_table_says_how_much_it_leaves_out():
    report = RestoreReport("p", restored=tuple(ReportEntry(f"v{i}", "int") for i in range(5)))
    assert report.table(limit=2).splitlines()[-1].split() == ["restored", "...", "and", "3", "more"]


def test_a_report_in_a_prompt_is_its_table_in_short():
    report = RestoreReport("p", restored=tuple(ReportEntry("v" * i, "int") for i in range(1, 22)))
    shown = repr(report)
    assert shown.startswith("<RestoreReport p: 0 mismatched")
    assert f" {'v' * 20} " in shown and "v" * 21 not in shown and "and 1 more" in shown


def test_an_error_names_the_first_problems_of_each_kind_and_counts_the_rest():
    many = tuple(ReportEntry(f"v{chr(ord('A') + i)}", "int") for i in range(60))
    text = describe_problems(RestoreReport("p", missing=many, unexpected=many[:50]), "Do.")
    assert "missing (60):" in text and text.count("vr: int") == 2
    assert "vs: int" not in text and text.count("... and 10 more, in the error's .report") == 1
    assert text.endswith("\nDo.")


def test_a_report_is_exact_only_if_nothing_differs():
    entry = (ReportEntry(SAVE_COUNTER),)
    assert RestoreReport("p", restored=entry).exact
    assert not any(RestoreReport("p", **{kind: entry}).exact for kind in KINDS[:4])


def test_a_report_says_how_values_change_and_what_there_is_to_read():
    entry = ReportEntry("w", "bfloat16[3]", "float32[3]", saved_path="old")
    report = RestoreReport(
        "p", restored=(entry,), renamed=(entry,), dtype_changes=(entry,), nbytes=3 << 20
    )
    header, row = str(report).splitlines()
    assert header.endswith("1 restored, 1 renamed, 1 of another dtype, 3.0 MiB")
    assert row.split(maxsplit=2) == ["restored", "w", "float32[3] -> bfloat16[3] <- old"]


def test_the_table_of_a_notebook_escapes_names_and_shows_problems_first():
    letters = [a + b for a in "abcde" for b in "abcdefghij"]
    restored = tuple(ReportEntry(name, "int") for name in letters)
    report = RestoreReport(
        "<dir>", restored=restored, missing=(ReportEntry("<u>&", "int", nearest=("<i>",)),)
    )
    text = report._repr_html_()
    assert "<dir>" not in text and "<u>&" not in text and "<i>" not in text
    assert "&lt;u&gt;&amp;" in text and "nearest: &lt;i&gt;" in text
    assert text.index("missing</b> (1)") < text.index("restored</b> (50)")
    assert "<summary>30 more</summary>" in text and text.count("<code>") == 51
    assert text.count("<details") == text.count("</details>") == 3
    assert "http" not in text and "<script" not in text
