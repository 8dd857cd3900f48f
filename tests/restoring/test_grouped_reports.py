"""Many values share a row, and a report suggests the rename rule that was forgotten."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import ckpt_jax as ckpt
from ckpt_jax.report import ReportEntry, RestoreReport, describe_problems
from ckpt_jax.restoring.moved import suggested_rename

MANY = 300


def blocks(name="block", top="enc"):
    return {top: {f"{name}_{i}": {"attn": {"w": np.float32(i)}} for i in range(MANY)}}


def test_an_error_groups_the_values_that_differ_in_numbers_only(tmp_path):
    path = ckpt.save(tmp_path / "a", {"net": blocks(), "step": 3})
    with pytest.raises(ckpt.RestoreMismatchError) as caught:
        ckpt.restore(path, {"net": blocks(top="encoder"), "step": 0})
    text = str(caught.value)
    assert f"net/encoder/block_*/attn/w x {MANY}: expected float32[]" in text
    assert f"net/enc/block_*/attn/w x {MANY}: float32[]" in text
    assert 'rename=[("net/enc/**", "net/encoder/**")]' in text
    assert len(text.splitlines()) < 10
    assert len(caught.value.report.missing) == MANY


def test_a_table_groups_too_and_counts_what_it_leaves_out():
    entries = [ReportEntry(f"v2/{kind}/{i}", "int") for kind in "abc" for i in range(40)]
    report = RestoreReport("p", restored=tuple(entries))
    rows = [line.split(maxsplit=1)[1] for line in str(report).splitlines()[1:]]
    assert [row.rsplit(maxsplit=1)[0] for row in rows] == [f"v2/{kind}/* x 40" for kind in "abc"]
    assert report.table(limit=1).splitlines()[-1].split() == [
        "restored",
        "...",
        "and",
        "80",
        "more",
    ]


def test_the_table_of_a_notebook_groups_too_and_suggests_the_rule():
    missing = [ReportEntry(f"net/block_{i}/w", "int") for i in range(4000)]
    others = [ReportEntry(a + b, "int") for a in "abcde" for b in "abcdef"]
    report = RestoreReport(
        "p", missing=(*missing, *others), suggested_renames=(("<a>/**", "net/**"),)
    )
    text = report._repr_html_()
    assert "<code>net/block_*/w x 4000</code>" in text and text.count("<code>") == 31
    assert "missing</b> (4030)" in text and "<summary>11 more</summary>" in text
    assert "rename=[(&quot;&lt;a&gt;/**&quot;, &quot;net/**&quot;)]" in text


def test_few_values_have_a_row_each():
    report = RestoreReport("p", missing=tuple(ReportEntry(f"v{i}", "int") for i in range(20)))
    assert "v19: int" in describe_problems(report, "Do.") and " x " not in str(report)


def test_values_that_differ_in_anything_else_are_not_grouped():
    entries = [ReportEntry(f"v{i}", f"float32[{i % 2}]") for i in range(40)]
    text = str(RestoreReport("p", missing=tuple(entries)))
    assert text.count("v* x 20") == 2 and "float32[0]" in text and "float32[1]" in text


CASES = [
    # missing, unexpected, rule
    (["w", "b"], ["state/w", "state/b", "state/c"], ("state/**", "**")),
    (["state/w", "state/b"], ["w", "b"], ("**", "state/**")),
    (["net/a/w", "net/b/w"], ["net/a/v", "net/b/v"], ("**/v", "**/w")),
    (["x/attn/w", "y/attn/w"], ["x/attention/w", "y/attention/w"], None),
    (["net/blocks_0/w", "net/blocks_1/w"], ["net/layer_0/w", "net/layer_1/w"], None),
    (["head/bias"], ["haed/bias"], ("haed/**", "head/**")),
]


@pytest.mark.parametrize(("missing", "unexpected", "rule"), CASES)
def test_the_suggested_rule_leads_from_every_unexpected_value_to_a_missing_one(
    tmp_path, missing, unexpected, rule
):
    found = suggested_rename(missing, unexpected)
    assert found is not None and (rule is None or found == rule)

    def tree(paths):
        root = {}
        for path in paths:
            *above, name = path.split("/")
            here = root
            for step in above:
                here = here.setdefault(step, {})
            here[name] = 0
        return root

    path = ckpt.save(tmp_path / "a", tree(unexpected))
    report = ckpt.plan_restore(path, tree(missing))
    assert report.suggested_renames == (found,)
    ckpt.restore(path, tree(missing), rename=report.suggested_renames, allow_unexpected=True)


def test_nothing_is_suggested_that_fits_less_than_half_or_takes_what_fits_already():
    assert suggested_rename(["a/w", "b/x", "c/y"], ["d/w"]) is None
    assert suggested_rename(["new/w"], ["old/w"], kept=["old/b"]) != ("old/**", "new/**")
    assert suggested_rename([], ["a"]) is None and suggested_rename(["a"], []) is None


def test_nothing_is_suggested_for_values_of_other_shapes(tmp_path):
    path = ckpt.save(tmp_path / "a", {"old": {"w": jnp.ones(2)}})
    for other in (jnp.ones(3), 1):
        assert not ckpt.plan_restore(path, {"new": {"w": other}}).suggested_renames
    same = {"new": {"w": jnp.ones(2)}}
    assert ckpt.plan_restore(path, same).suggested_renames == (("old/**", "new/**"),)
    waits = ckpt.Checkpoint(**same).read(path).report
    assert waits.deferred and waits.suggested_renames == (("old/**", "new/**"),)


def test_the_suggestion_for_a_train_state_takes_its_moments_along(tmp_path):
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    path = ckpt.save(tmp_path / "a", {"state": state})
    report = ckpt.plan_restore(path, state)
    assert report.suggested_renames == (("state/**", "**"),)
    assert ckpt.plan_restore(path, state, rename=report.suggested_renames).exact


@pytest.mark.parametrize("rule", [("state/**", "s/**"), ("state/**", "**")])
def test_a_rule_for_everything_below_moves_an_optimizer_with_its_slots(tmp_path, rule):
    params = {"w": jnp.ones(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    path = ckpt.save(tmp_path / "a", {"state": state})
    target = {"s": state} if rule[1] == "s/**" else state
    assert ckpt.plan_restore(path, target, rename=[rule]).exact


def test_assertions_say_the_nearest_and_the_rule(tmp_path):
    path = ckpt.save(tmp_path / "a", {"params": {"w": 1, "kernel": 2}})
    checkpoint = ckpt.Checkpoint(model={"w": 0, "kernel": 0})
    status = checkpoint.read(path)
    with pytest.raises(
        AssertionError, match=r"\(root\).model.kernel \(nearest: params/kernel"
    ) as e:
        status.assert_existing_objects_matched()
    assert 'rename=[("params/**", "model/**")]' in str(e.value)
    checkpoint = ckpt.Checkpoint(params={"w": 0, "kernal": 0})
    status = checkpoint.read(path).expect_partial()
    with pytest.raises(AssertionError, match="kernal .*nearest: params/kernel"):
        status.assert_consumed()


def test_what_is_unresolved_says_the_nearest(tmp_path):
    path = ckpt.save(tmp_path / "a", {"params": {"w": 1, "kernel": 2}})
    checkpoint = ckpt.Checkpoint(params={"w": 0})
    with pytest.raises(AssertionError, match=r"Unresolved object in checkpoint \(root\)\.params\."):
        checkpoint.read(path).assert_consumed()
