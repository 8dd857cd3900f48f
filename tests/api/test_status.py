"""The status that a restore returns: what it asserts, shows and logs."""

import gc
import logging
import os
import weakref

import jax.numpy as jnp
import pytest
from trackables import Model, Position, value, var

import ckpt_jax as ckpt

# --- assertions and reports -------------------------------------------------------------


def test_assertions_return_the_status_for_chaining(path):
    checkpoint = ckpt.Checkpoint(v=var(1.0))
    status = checkpoint.read(checkpoint.write(path))
    assert status.assert_consumed() is status
    assert status.assert_existing_objects_matched() is status
    assert status.assert_nontrivial_match() is status
    assert status.expect_partial() is status
    assert status.initialize_or_restore() is status


def test_what_a_prompt_or_a_notebook_shows_says_what_it_is(prefix):
    checkpoint = ckpt.Checkpoint({"a": 1}, v=var(1.0))
    assert repr(checkpoint) == "<Checkpoint of root dict, v>"
    saved = checkpoint.save(prefix)
    assert repr(checkpoint) == "<Checkpoint of root dict, v>"
    assert repr(ckpt.Checkpoint()) == "<Checkpoint of nothing yet>"
    status = checkpoint.restore(saved)
    assert saved in repr(status)
    assert status._repr_html_() == status.report._repr_html_()
    assert repr(checkpoint.restore(None)).startswith("<LoadStatus of no checkpoint")
    with ckpt.load_checkpoint(saved) as reader:
        assert repr(reader) == f"CheckpointReader({saved!r})"
    manager = ckpt.CheckpointManager(checkpoint, os.path.dirname(prefix))
    manager.save()
    where = os.path.dirname(prefix)
    assert repr(manager) == f"<CheckpointManager of {where}: 1 checkpoint, the latest of step 2>"
    assert manager._repr_html_().endswith("<tr><td>step</td></tr><tr><td>2</td></tr></table>")
    manager.save(3, metrics={"a<b": 0.5})
    shown = manager._repr_html_()
    assert "<td>a&lt;b</td></tr><tr><td>2</td><td></td></tr><tr><td>3</td><td>0.5</td>" in shown


def test_an_assertion_about_no_checkpoint_says_where_none_comes_from():
    with pytest.raises(AssertionError, match="latest_checkpoint returns where there is none"):
        ckpt.Checkpoint(v=var(1.0)).restore(None).assert_consumed()


@pytest.mark.behaviour(15)
def test_a_status_outlives_its_checkpoint(prefix):
    saved = ckpt.Checkpoint(v=var(1.0)).save(prefix)
    fresh = ckpt.Checkpoint(v=var(0.0))
    status = fresh.restore(saved)
    del fresh
    gc.collect()
    status.assert_consumed()


def test_leaving_the_block_of_a_status_asserts_consumption(path):
    ckpt.Checkpoint(v=var(1.0), w=var(2.0)).write(path)
    fresh = ckpt.Checkpoint(v=var(0.0))
    with pytest.raises(AssertionError, match=r"\(root\)\.w"), fresh.read(path):
        pass
    with fresh.read(path) as status:
        fresh.w = var(0.0)
    assert status.report.exact and value(fresh.w) == 2.0


def test_an_error_inside_the_block_is_not_replaced_by_an_assertion(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    with pytest.raises(KeyError), ckpt.Checkpoint().read(path):
        raise KeyError


@pytest.mark.behaviour(26, 29)
def test_a_value_without_a_place_in_its_object_is_an_unused_attribute(prefix):
    saved = ckpt.Checkpoint(v1=var(1.0), v2=var(2.0)).save(prefix)
    fresh = ckpt.Checkpoint(v1=ckpt.Trackable(), v2=var(0.0))
    status = fresh.restore(saved)
    assert value(fresh.v2) == 2.0
    status.assert_existing_objects_matched()
    with pytest.raises(AssertionError, match="Unused attributes.*v1"):
        status.assert_consumed()


def test_an_object_that_the_checkpoint_lacks_is_not_matched(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    status = ckpt.Checkpoint(v=var(0.0), extra=Model(w=var(0.0))).read(path)
    status.assert_nontrivial_match()
    with pytest.raises(AssertionError, match=r"\(root\)\.extra\.w"):
        status.assert_existing_objects_matched()


def test_python_state_that_the_checkpoint_lacks_is_not_matched(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    status = ckpt.Checkpoint(v=var(0.0), p=Position()).read(path)
    with pytest.raises(AssertionError, match=r"\(root\)\.p"):
        status.assert_existing_objects_matched()


def test_a_match_of_nothing_but_the_root_is_trivial(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    with pytest.raises(AssertionError, match="It holds v; the program has w"):
        ckpt.Checkpoint(w=var(0.0)).read(path).assert_nontrivial_match()
    with pytest.raises(AssertionError, match="tracks no objects"):
        ckpt.Checkpoint().read(path).assert_nontrivial_match()


def test_objects_without_values_never_fail_an_assertion(path):
    ckpt.Checkpoint(v=var(1.0), gone=Model(deep=Model())).write(path)
    ckpt.Checkpoint(v=var(0.0), new=Model(deep=Model())).read(path).assert_consumed()


@pytest.mark.behaviour(48)
def test_empty_containers_are_ignored(prefix):
    saved = Model(v=var(1.0), l=[], nested=[[]])
    saved_path = ckpt.Checkpoint(saved).save(prefix)
    fresh = Model(v=var(0.0), other=[], d={})
    status = ckpt.Checkpoint(fresh).restore(saved_path)
    fresh.nested = []
    fresh.nested.append([])
    status.assert_consumed()
    status.assert_existing_objects_matched()
    status.assert_nontrivial_match()


@pytest.mark.behaviour(60, 61)
def test_plain_data_that_was_added_after_the_save_breaks_nothing(prefix):
    model = Model(v=var(1.0))
    checkpoint = ckpt.Checkpoint(model)
    checkpoint.restore(None).initialize_or_restore()
    saved = checkpoint.save(prefix)
    fresh = Model(v=var(0.0), d={"a": 1}, l=[1, "b"], empty={})
    ckpt.Checkpoint(fresh).restore(saved).assert_existing_objects_matched()
    assert value(fresh.v) == 1.0 and fresh.d == {"a": 1}


def test_a_restored_object_that_is_dropped_is_missed(path):
    ckpt.Checkpoint(Model(v=var(1.0))).write(path)
    root = Model(v=var(0.0))
    status = ckpt.Checkpoint(root).read(path).assert_consumed()
    del root.v
    with pytest.raises(AssertionError, match=r"\(root\)\.v"):
        status.assert_consumed()


def test_at_most_ten_names_are_listed_and_the_rest_is_counted(path):
    ckpt.Checkpoint(v=var(1.0)).write(path)
    many = {f"w{i:02}": var(0.0) for i in range(15)}
    with pytest.raises(AssertionError) as caught:
        ckpt.Checkpoint(v=var(0.0), **many).read(path).assert_existing_objects_matched()
    message = str(caught.value)
    assert message.count("(root).w") == 10 and "15 in all" in message


def test_the_report_shows_how_things_stand_now(path):
    ckpt.Checkpoint(Model(a=var(1.0), late=Model(b=var(2.0)))).write(path)
    root = Model(a=var(0.0), extra=var(0.0))
    status = ckpt.Checkpoint(root).read(path)
    report = status.report
    assert [entry.path for entry in report.restored] == ["a"]
    assert [entry.path for entry in report.deferred] == ["late/b"]
    assert [entry.path for entry in report.missing] == ["extra"]
    root.late = Model(b=var(0.0))
    assert [entry.path for entry in status.report.restored] == ["a", "late/b"]
    assert not status.report.deferred
    assert report.deferred and report.path == path


def test_an_array_that_meets_none_is_not_matched(path):
    ckpt.Checkpoint(o={"a": None, "b": 1}).write(path)
    status = ckpt.Checkpoint(o={"a": jnp.ones(1), "b": 0}).read(path)
    with pytest.raises(AssertionError):
        status.assert_consumed()


def test_what_waits_is_reported_and_demanded_on_leaving_the_block(tmp_path):
    saved = ckpt.AutoTrackable()
    saved.built_later = ckpt.Variable(jnp.ones(2))
    path = ckpt.Checkpoint(model=saved).save(tmp_path / "a")
    model = ckpt.AutoTrackable()
    with (
        pytest.raises(AssertionError, match="built_later"),
        ckpt.Checkpoint(model=model).restore(path) as status,
    ):
        assert [entry.path for entry in status.report.deferred] == ["model/built_later"]
    with ckpt.Checkpoint(model=model).restore(path):
        model.built_later = ckpt.Variable(jnp.zeros(2))
    assert model.built_later.value.tolist() == [1, 1]


# --- what is logged ---------------------------------------------------------------------


@pytest.mark.behaviour(26, 27)
def test_values_that_nobody_took_are_logged(path, caplog):
    """When the last reference to the restore goes."""
    ckpt.Checkpoint(v1=var(1.0), v2=var(2.0)).write(path)
    fresh = ckpt.Checkpoint(v1=ckpt.Trackable(), v2=var(0.0))
    with caplog.at_level(logging.WARNING):
        fresh.read(path)
        del fresh
    assert "(root).v1" in caplog.text and "expect_partial()" in caplog.text
    assert "(root).v2" not in caplog.text


def test_a_restore_that_raised_logs_nothing_about_its_values(path, caplog):
    ckpt.Checkpoint(v1=var(1.0), v2=var([2.0, 2.0])).write(path)
    fresh = ckpt.Checkpoint(v2=var(0.0))
    with caplog.at_level(logging.WARNING), pytest.raises(ckpt.RestoreMismatchError) as caught:
        fresh.read(path)
    assert "strict=" not in str(caught.value), "which is not an argument here"
    del fresh, caught
    gc.collect()
    assert caplog.text == ""


def test_two_values_for_one_object_are_logged_by_their_names(path, caplog):
    ckpt.Checkpoint(v=var(1.0), ema=var(2.0)).write(path)
    shared = var(0.0)
    with caplog.at_level(logging.WARNING):
        ckpt.Checkpoint(v=shared, ema=shared).read(path).expect_partial()
    assert "(root).ema and (root).v, one object in the program" in caplog.text


@pytest.mark.behaviour(26, 27, 28)
def test_what_was_never_used_is_logged_at_once_where_nothing_waits(path, caplog, no_gc):
    ckpt.Checkpoint(v1=var(1.0), v2=var(2.0)).write(path)
    fresh = ckpt.Checkpoint(v1=ckpt.Trackable(), v2=var(0.0))
    fresh.read(path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "(root).v1" in caplog.text and "(root).v2" not in caplog.text
    assert "expect_partial()" in caplog.text
    assert value(fresh.v2) == 2.0
    gone = [weakref.ref(fresh.v2), weakref.ref(fresh)]
    del fresh
    assert [ref() for ref in gone] == [None, None]
    assert len(caplog.records) == 1


@pytest.mark.behaviour(30, 31)
def test_what_was_expected_to_be_partial_is_not_logged(path, caplog, no_gc):
    ckpt.Checkpoint(Model(v1=var(1.0), v2=var(2.0), v3=var(3.0))).write(path)
    fresh = ckpt.Checkpoint(Model(v1=ckpt.Trackable(), v2=var(0.0)))
    fresh.read(path).expect_partial()
    gone = [weakref.ref(fresh.root.v2), weakref.ref(fresh)]
    del fresh
    assert [ref() for ref in gone] == [None, None]
    assert not caplog.records


def test_a_counter_that_was_not_saved_says_which_verb_fits(tmp_path):
    path = ckpt.save(tmp_path / "a", {"x": 1})
    checkpoint = ckpt.Checkpoint(x=0)
    with pytest.raises(AssertionError, match=r"\(root\)\.save_counter: .*Use read\(\)"):
        checkpoint.restore(path).assert_existing_objects_matched()
    ckpt.Checkpoint(x=0).read(path).assert_consumed()
