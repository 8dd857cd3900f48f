"""Going back to an earlier step: which checkpoints stay, and which one a restart takes."""

import logging
import os
import shutil
import signal
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from managers import numbers_in, run_in, save

import ckpt_jax as ckpt

pytestmark = pytest.mark.usefixtures("no_flushing")


def names(paths):
    return [os.path.basename(path) for path in paths]


# --- retention --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["the manager", "the checkpoint", "read"])
def test_after_going_back_the_abandoned_branch_goes_before_the_live_one(tmp_path, how):
    manager = run_in(tmp_path, max_to_keep=3)
    save(manager, 1000, 2000, 3000, 4000, 5000)
    if how == "the manager":
        assert manager.restore(3000).report.path == str(tmp_path / "ckpt-3000")
    elif how == "the checkpoint":
        manager.checkpoint.restore(tmp_path / "ckpt-3000")
    else:
        manager.checkpoint.read(tmp_path / "ckpt-3000")
    kept = []
    for step in (3100, 3200, 3300):
        save(manager, step)
        kept.append(manager.steps)
    assert kept == [(5000, 3000, 3100), (3000, 3100, 3200), (3100, 3200, 3300)]


def test_a_step_beyond_the_abandoned_branch_does_not_bring_it_back(tmp_path):
    manager = run_in(tmp_path, max_to_keep=None)
    save(manager, 100, 200, 300, 400)
    manager.restore(200)
    path = save(manager, 500)
    shutil.rmtree(path)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-200")
    again = run_in(tmp_path)
    assert again.restore_or_initialize() == str(tmp_path / "ckpt-200")


def test_a_restart_falls_back_along_the_live_branch(tmp_path):
    manager = run_in(tmp_path, max_to_keep=None)
    save(manager, 100, 200, 300)
    manager.restore(100)
    path = save(manager, 150, 250, 350)
    shutil.rmtree(path)
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-250")
    again = run_in(tmp_path, max_to_keep=None)
    assert again.restore_or_initialize() == str(tmp_path / "ckpt-250")
    assert again.checkpoint.step == 250
    assert again.steps == (200, 300, 100, 150, 250, 350)


def test_a_step_that_is_saved_again_belongs_to_the_live_branch(tmp_path):
    manager = run_in(tmp_path, max_to_keep=None)
    save(manager, 1, 2, 3, 4)
    manager.restore(1)
    save(manager, 2, 3)
    assert manager.steps == (4, 1, 2, 3)
    assert run_in(tmp_path).steps == (4, 1, 2, 3)


def test_after_a_restart_that_fell_back_the_damaged_one_is_abandoned(tmp_path):
    manager = run_in(tmp_path)
    path = save(manager, 1, 2, 3)
    os.unlink(os.path.join(path, "manifest.ckpt"))
    again = run_in(tmp_path, max_to_keep=2)
    again.restore_or_initialize()
    save(again, 4)
    assert again.steps == (2, 4)


def test_policies_still_keep_their_own_of_an_abandoned_branch(tmp_path):
    manager = run_in(
        tmp_path, max_to_keep=1, policies=[ckpt.KeepEveryNSteps(20), ckpt.KeepBest("x", 1, "min")]
    )
    for step, x in ((10, 3.0), (20, 2.0), (25, 0.5), (30, 9.0)):
        save(manager, step, metrics={"x": x})
    manager.restore(10 if os.path.exists(tmp_path / "ckpt-10") else 20)
    save(manager, 21, metrics={"x": 1.0})
    assert manager.steps == (25, 20, 21)


@pytest.mark.parametrize("is_new_program", [False, True])
def test_after_going_back_onto_an_abandoned_branch_all_that_led_to_it_is_live(
    tmp_path, is_new_program
):
    manager = run_in(tmp_path, max_to_keep=None)
    save(manager, 10, 20, 30, 40)
    manager.restore(20)
    save(manager, 25, 35)
    assert manager.steps == (30, 40, 10, 20, 25, 35)
    if is_new_program:
        manager = run_in(tmp_path, max_to_keep=None)
    manager.restore(40)
    path = save(manager, 50)
    assert manager.steps == run_in(tmp_path).steps == (25, 35, 10, 20, 30, 40, 50)
    shutil.rmtree(path)
    shutil.rmtree(tmp_path / "ckpt-40")
    assert ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-30")
    assert run_in(tmp_path).restore_or_initialize() == str(tmp_path / "ckpt-30")


def test_a_removed_or_replaced_checkpoint_does_not_cut_its_branch(tmp_path):
    manager = run_in(tmp_path, max_to_keep=None)
    save(manager, 10, 20, 30, 40)
    manager.restore(10)
    save(manager, 20)  # another one; the old 30 and 40 came from 10
    assert manager.steps == (30, 40, 10, 20)
    manager.restore(30)
    manager.delete(10)
    save(manager, 50)
    assert manager.steps == (20, 40, 30, 50)


@st.composite
def histories(draw):
    """Saves, steps back, restarts, restarts after damage, and saves that are not recorded."""
    events = st.tuples(
        st.sampled_from(["save", "save", "save", "back", "restart", "damage", "callback"]),
        st.integers(1, 30),
    )
    return draw(st.lists(events, max_size=14)), draw(st.none() | st.integers(1, 4))


@settings(max_examples=60)
@given(histories())
def test_the_directory_holds_the_newest_of_the_live_branch(history):
    """The oracle keeps every save that there ever was, with the one that it came from."""
    events, limit = history
    with tempfile.TemporaryDirectory() as directory:
        manager = run_in(directory, max_to_keep=limit)
        came_from: list[int | None] = []  # by save
        numbers: list[int] = []  # by save
        managed: dict[int, int] = {}  # number -> save, of those that are recorded
        unrecorded: dict[int, int] = {}
        live: set[int] = set()  # numbers
        latest: int | None = None
        at: int | None = None  # the save from which the program goes on

        def new_save(number):
            came_from.append(at)
            numbers.append(number)
            return len(numbers) - 1

        def branch(save):
            while save is not None:
                yield save
                save = came_from[save]

        def fail():
            raise ValueError("not today")

        for kind, by in events:
            number = by if at is None else numbers[at] + by
            if kind == "save":
                save(manager, number)
                at = new_save(number)
                managed = {**managed, **unrecorded, number: at}
                unrecorded = {}
                latest = number
                live = {numbers[each] for each in branch(at) if managed.get(numbers[each]) == each}
                order = sorted(managed.keys() - live) + sorted(live)
                kept = order[-limit:] if limit is not None else order
                managed = {each: managed[each] for each in kept}
                live &= managed.keys()
                assert manager.steps == tuple(kept)
            elif kind == "callback":
                with pytest.raises(ValueError, match="not today"):
                    save(manager, number, options=ckpt.CheckpointOptions(write_callbacks=[fail]))
                if number in managed:
                    managed.pop(number)
                    live.discard(number)
                    if number == latest:
                        latest = None  # it is there, with other values
                if latest is None:
                    return
                at = unrecorded[number] = new_save(number)
            elif kind == "back" and managed:
                there = sorted(managed.keys() & set(numbers_in(directory)))
                at = managed[there[by % len(there)]]
                manager.restore(numbers[at])
                assert manager.checkpoint.step == numbers[at]
            elif kind in ("restart", "damage") and latest is not None and not unrecorded:
                if kind == "damage":
                    if len(live & set(numbers_in(directory))) < 2:
                        continue
                    shutil.rmtree(f"{directory}/ckpt-{latest}", ignore_errors=True)
                manager = run_in(directory, max_to_keep=limit)
                manager.restore_or_initialize()
                at = managed[max(live & set(numbers_in(directory)))]
                assert manager.checkpoint.step == numbers[at]
            there = set(numbers_in(directory))
            assert there <= managed.keys() | unrecorded.keys()
            if limit is not None and not unrecorded:
                assert len(there) <= limit


# --- the interval -----------------------------------------------------------------------------


def interval_of_10(directory, checkpoint=None, **arguments):
    checkpoint = checkpoint or ckpt.Checkpoint(step=0)
    return ckpt.CheckpointManager(
        checkpoint,
        directory,
        step_counter=lambda: checkpoint.step,
        checkpoint_interval=10,
        max_to_keep=None,
        **arguments,
    )


def due(manager, steps):
    saved = []
    for step in steps:
        manager.checkpoint.step = step
        if manager.save(step):
            saved.append(step)
    return saved


@pytest.mark.parametrize("is_new_program", [False, True])
@pytest.mark.parametrize("by_manager", [False, True])
def test_the_interval_counts_from_where_the_program_went_back_to(
    tmp_path, is_new_program, by_manager
):
    manager = interval_of_10(tmp_path)
    assert due(manager, range(101)) == list(range(0, 101, 10))
    if is_new_program:
        manager = interval_of_10(tmp_path)
        manager.restore_or_initialize()
    if by_manager:
        manager.restore(80)
    else:
        manager.checkpoint.restore(tmp_path / "ckpt-80")
    assert manager.save(80) is None
    assert due(manager, range(81, 101)) == [90, 100]


def test_the_interval_counts_from_the_last_saved_step_if_the_counter_is_not_in_the_checkpoint(
    tmp_path,
):
    step = [0]
    manager = ckpt.CheckpointManager(
        ckpt.Checkpoint(x=1), tmp_path, step_counter=lambda: step[0], checkpoint_interval=10
    )
    saved = []
    for step[0] in [*range(101), *range(81, 101)]:
        if manager.save(step[0]):
            saved.append(step[0])
    assert saved == [*range(0, 101, 10), 90, 100]


def test_a_jump_forward_by_a_restore_counts_from_there(tmp_path):
    other = ckpt.Checkpoint(step=500).write(tmp_path / "other")
    manager = interval_of_10(tmp_path / "run")
    assert due(manager, range(1, 12)) == [1, 11]
    manager.checkpoint.read(other)
    assert due(manager, range(501, 521)) == [510, 520]


def test_a_checkpoint_from_elsewhere_does_not_make_the_first_save_wait(tmp_path):
    other = ckpt.Checkpoint(step=500).write(tmp_path / "other")
    manager = interval_of_10(tmp_path / "run")
    manager.checkpoint.read(other)
    assert due(manager, range(500, 511)) == [500, 510]


def test_force_saves_whatever_the_interval_says(tmp_path):
    manager = interval_of_10(tmp_path)
    assert due(manager, range(6)) == [0]
    manager.checkpoint.step = 6
    assert names([manager.save(6, force=True)]) == ["ckpt-6"]
    assert names([manager.save(7, force=True)]) == ["ckpt-7"]  # at the same step
    assert due(manager, range(7, 17)) == [16]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_an_interval_with_one_checkpoint_kept_for_every_50_steps(tmp_path, first):
    manager = interval_of_10(tmp_path)
    manager = ckpt.CheckpointManager(
        manager.checkpoint,
        tmp_path,
        max_to_keep=2,
        step_counter=lambda: manager.checkpoint.step,
        checkpoint_interval=10,
        policies=[ckpt.KeepEveryNSteps(50)],
    )
    due(manager, range(first, 171))
    kept = {0: [0, 50, 100, 150, 160, 170], 1: [51, 101, 151, 161], 3: [53, 103, 153, 163]}
    assert numbers_in(tmp_path) == kept[first]


# --- the arguments of a save ------------------------------------------------------------------


def test_metrics_as_second_argument_are_refused(tmp_path):
    with pytest.raises(TypeError):
        run_in(tmp_path).save(1, {"loss": 0.5})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"check_interval": {"loss": 0.5}},
        {"force": 1.5},
        {"options": {"enable_async": True}},
        {"metrics": 0.5},
        {"metric": {"loss": 1.0}},
    ],
)
def test_an_argument_of_another_kind_is_refused(tmp_path, arguments):
    manager = run_in(tmp_path)
    with pytest.raises(TypeError):
        manager.save(1, **arguments)
    assert not os.listdir(tmp_path)
    assert manager.checkpoint.save_counter == 0


@pytest.mark.parametrize("where", ["policies", "max_to_keep", "a union"])
@pytest.mark.parametrize("metrics", [{"loss": 0.5}, {}, {"loss": 1.0, "acc": 2.0}])
def test_a_policy_for_a_metric_that_no_save_gives_is_an_error_at_the_first_save(
    tmp_path, where, metrics
):
    policy = ckpt.KeepBest("losss")
    arguments = {
        "policies": {"policies": [policy]},
        "max_to_keep": {"max_to_keep": policy},
        "a union": {"policies": ckpt.KeepAny([ckpt.KeepLatest(2), policy])},
    }[where]
    manager = run_in(tmp_path, **arguments)
    with pytest.raises(ValueError, match="'losss'") as raised:
        manager.save(1, metrics=metrics)
    assert all(repr(name) in str(raised.value) for name in metrics)
    assert not os.listdir(tmp_path)
    assert manager.checkpoint.save_counter == 0


def test_a_metric_that_was_given_before_may_be_left_out(tmp_path):
    manager = run_in(tmp_path, max_to_keep=1, policies=[ckpt.KeepBest("acc")])
    save(manager, 1, metrics={"acc": 0.5})
    save(manager, 2, metrics={"loss": 3.0})
    save(manager, 3)
    assert manager.steps == (1, 3)


def test_saves_without_any_metrics_are_told_once_that_a_policy_keeps_nothing(tmp_path, caplog):
    manager = run_in(tmp_path, policies=[ckpt.KeepBest("acc")])
    save(manager, 1, 2, 3, 4)
    (record,) = caplog.records
    assert "'acc'" in record.getMessage() and str(tmp_path) in record.getMessage()


@pytest.mark.parametrize(
    "arguments", [{"policies": [ckpt.KeepAny(())]}, {"max_to_keep": ckpt.KeepAny([])}]
)
def test_a_policy_that_can_keep_nothing_is_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="can keep something"):
        run_in(tmp_path, **arguments)


def test_a_policy_that_answers_with_paths_is_an_error(tmp_path):
    class Paths:
        def keep(self, records):
            return {record.path for record in records}

    manager = run_in(tmp_path, policies=[Paths()])
    with pytest.raises(TypeError, match=r"record\.number"):
        manager.save(1)


def test_no_checkpoint_is_removed_in_favour_of_one_that_was_removed_by_hand(tmp_path):
    best = run_in(tmp_path / "best", max_to_keep=1, policies=ckpt.KeepBest("acc"))
    save(best, 1, metrics={"acc": 5})
    shutil.rmtree(tmp_path / "best" / "ckpt-1")
    save(best, 2, metrics={"acc": 3})
    save(best, 3, metrics={"acc": 1})
    assert best.steps == (2, 3) and numbers_in(tmp_path / "best") == [2, 3]
    latest = run_in(tmp_path / "latest", max_to_keep=3)
    save(latest, 1, 2, 3)
    shutil.rmtree(tmp_path / "latest" / "ckpt-3")
    save(latest, 4)
    assert numbers_in(tmp_path / "latest") == [1, 2, 4]
    save(latest, 5)
    assert latest.steps == (2, 4, 5) and numbers_in(tmp_path / "latest") == [2, 4, 5]


@pytest.mark.parametrize("answer", [None, 3, ["1"], [1.5]])
def test_a_policy_whose_answer_is_no_numbers_is_named_and_what_was_saved_stays(tmp_path, answer):
    class Odd:
        def keep(self, records):
            return answer if len(records) > 1 else ()

    manager = run_in(tmp_path, max_to_keep=1, policies=[Odd()])
    save(manager, 1)
    with pytest.raises(TypeError, match=r"Odd object.*record\.number") as raised:
        save(manager, 2)
    assert manager.steps == (1, 2) and manager.latest_checkpoint.endswith("ckpt-2")
    assert "ckpt-2 was saved and is the latest" in raised.value.__notes__[0]


@pytest.mark.parametrize("policies", [5, [None], "x", object()])
def test_policies_that_are_none_are_refused_by_name(tmp_path, policies):
    with pytest.raises(TypeError, match="expected policies that say what to keep or when to save"):
        run_in(tmp_path, policies=policies)


def test_numbers_of_the_save_counter_under_a_policy_of_steps_are_told_once(tmp_path, caplog):
    manager = interval_of_10(tmp_path, policies=[ckpt.KeepEveryNSteps(50)])
    for manager.checkpoint.step in range(40):
        manager.save()
    (record,) = caplog.records
    assert "save(step)" in record.getMessage()


def test_the_best_three_are_one_word(tmp_path):
    manager = run_in(tmp_path, max_to_keep=ckpt.KeepBest("loss", 3, "min"))
    for step, loss in enumerate([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0]):
        save(manager, step, metrics={"loss": loss})
    assert manager.steps == (1, 3, 4, 6)
    one = run_in(tmp_path / "one", max_to_keep=1, policies=ckpt.KeepBest("loss"))
    for step, loss in enumerate([1.0, 3.0, 2.0, 0.0]):
        save(one, step, metrics={"loss": loss})
    assert one.steps == (1, 3)


# --- restoring, asking, deleting --------------------------------------------------------------


def test_a_manager_restores_the_latest_a_step_or_the_best(tmp_path):
    manager = run_in(tmp_path)
    for step, loss in ((1, 0.5), (2, 0.25), (3, 8.0)):
        save(manager, step, metrics={"loss": loss})
    fresh = run_in(tmp_path)
    for arguments, step in (
        ({}, 3),
        ({"step": 1}, 1),
        ({"best": "loss"}, 2),
        ({"best": "loss", "mode": "max"}, 3),
    ):
        status = fresh.restore(**arguments).assert_consumed()
        assert fresh.checkpoint.step == step
        assert fresh.status is status
    assert fresh.best("loss") == str(tmp_path / "ckpt-2")
    assert fresh.best("loss", "max") == str(tmp_path / "ckpt-3")
    assert fresh.metrics(2) == {"loss": 0.25}
    assert fresh.steps == (1, 2, 3)


def test_what_is_not_there_is_not_restored_and_the_error_names_what_is(tmp_path):
    manager = run_in(tmp_path)
    with pytest.raises(ckpt.CheckpointNotFoundError, match="found none"):
        manager.restore()
    assert manager.best("loss") is None
    save(manager, 1, metrics={"loss": 1.0})
    with pytest.raises(ckpt.CheckpointNotFoundError, match=r"of the steps 1\b"):
        manager.restore(7)
    for ask in (lambda: manager.restore(best="losss"), lambda: manager.best("losss")):
        with pytest.raises(ValueError, match="'losss'.*'loss'"):
            ask()
    with pytest.raises(ValueError, match="a step or a metric"):
        manager.restore(1, best="loss")
    with pytest.raises(ValueError, match="mode"):
        manager.best("loss", "best")
    with pytest.raises(ckpt.CheckpointNotFoundError, match=r"ckpt-7, found 1\b"):
        manager.metrics(7)


def test_a_deleted_checkpoint_is_gone_from_disk_and_records(tmp_path):
    manager = run_in(tmp_path)
    save(manager, 1, 2, 3)
    manager.delete(2)
    assert manager.steps == (1, 3) and numbers_in(tmp_path) == [1, 3]
    manager.delete(3)
    assert manager.latest_checkpoint == ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1")
    assert run_in(tmp_path).steps == (1,)
    with pytest.raises(ValueError, match="another usable checkpoint"):
        manager.delete(1)
    with pytest.raises(ckpt.CheckpointNotFoundError):
        manager.delete(2)
    assert numbers_in(tmp_path) == [1]


def test_after_the_latest_of_a_live_branch_is_deleted_the_one_before_it_is_the_latest(tmp_path):
    manager = run_in(tmp_path)
    save(manager, 10, 20, 30)
    manager.restore(10)
    save(manager, 40)
    manager.delete(40)
    assert manager.latest_checkpoint == str(tmp_path / "ckpt-10")


# --- what was not restored --------------------------------------------------------------------


def test_what_was_not_restored_is_said_in_one_warning(tmp_path, caplog):
    old = ckpt.CheckpointManager(ckpt.Checkpoint(a=1, b=2), tmp_path)
    old.save()
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(a=0, c=3), tmp_path)
    assert manager.restore_or_initialize() == str(tmp_path / "ckpt-1")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (str(tmp_path / "ckpt-1"), "lacks c", "yet is b", "rename"):
        assert part in record.getMessage()
    assert manager.status is not None
    with pytest.raises(AssertionError):
        manager.status.assert_consumed()


def test_a_whole_restore_says_nothing(tmp_path, caplog):
    run_in(tmp_path).save()
    manager = run_in(tmp_path)
    manager.restore_or_initialize()
    manager.status.assert_consumed()
    assert not caplog.records


@pytest.mark.parametrize("by", ["restore_or_initialize", "restore"])
def test_a_program_of_other_names_does_not_count_as_restored(tmp_path, by):
    ckpt.CheckpointManager(ckpt.Checkpoint(model={"w": 1}), tmp_path).save()
    manager = ckpt.CheckpointManager(ckpt.Checkpoint(modle={"w": 0}), tmp_path)
    with pytest.raises(ckpt.RestoreMismatchError, match="nothing of this checkpoint") as raised:
        getattr(manager, by)()
    assert "model/w" in str(raised.value) and "modle/w" in str(raised.value)
    assert raised.value.report.missing
    assert manager.checkpoint.save_counter == 0
    manager.restore(rename=[("model/**", "modle/**")]).assert_consumed()
    assert manager.checkpoint.modle == {"w": 1}


def test_objects_that_are_built_later_still_get_what_waits(tmp_path):
    def built(value):
        model = ckpt.AutoTrackable()
        model.w = ckpt.Variable(value)
        return model

    ckpt.CheckpointManager(ckpt.Checkpoint(model=built(1)), tmp_path).save()
    for late in (ckpt.Checkpoint(model=ckpt.AutoTrackable()), ckpt.Checkpoint()):
        manager = ckpt.CheckpointManager(late, tmp_path)
        assert manager.restore_or_initialize() == str(tmp_path / "ckpt-1")
        if hasattr(late, "model"):
            late.model.w = ckpt.Variable(0)
        else:
            late.model = built(0)
        assert late.model.w.value == 1


# --- saves in the middle of saves -------------------------------------------------------------


class Interrupted(ckpt.PythonState):
    """A signal arrives while this is saved."""

    is_armed = False

    def serialize(self):
        if self.is_armed:
            self.is_armed = False
            os.kill(os.getpid(), signal.SIGUSR1)
        return "x"

    def deserialize(self, value):
        pass


@pytest.fixture
def on_signal():
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda act: signal.signal(signal.SIGUSR1, lambda *_: act())
    signal.signal(signal.SIGUSR1, before)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("same_number", [False, True])
@pytest.mark.parametrize("is_managed", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_save_in_a_signal_handler_is_newer_than_the_one_that_it_interrupts(
    tmp_path, on_signal, raises, same_number, is_managed, is_async
):
    checkpoint = ckpt.Checkpoint(step=0, hook=Interrupted())
    manager = ckpt.CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    options = ckpt.CheckpointOptions(enable_async=is_async)

    def save_one(number=None):
        if is_managed:
            return manager.save(number, options=options)
        return checkpoint.save(tmp_path / "ckpt", options)

    save_one()
    save_one()

    def handler():
        checkpoint.step = 11
        save_one(7 if same_number else None)
        if raises:
            raise Stop

    on_signal(handler)
    checkpoint.sync()
    checkpoint.step, checkpoint.hook.is_armed = 10, True
    try:
        path = save_one(7 if same_number else None)
    except Stop:
        path = None
    checkpoint.sync()
    assert path is None or ckpt.verify(path).ok
    latest = ckpt.latest_checkpoint(tmp_path)
    assert ckpt.load(latest)["step"] == 11
    if not (is_managed and same_number):
        assert checkpoint.save_counter >= numbers_in(tmp_path)[-1]
    if is_managed:
        assert manager.latest_checkpoint == latest
        for _ in range(3):
            save_one()
        manager.sync()
        assert len(numbers_in(tmp_path)) == 2


def test_a_write_callback_that_saves_again_makes_the_latest(tmp_path):
    manager = run_in(tmp_path, max_to_keep=2)

    def again():
        save(manager, 2)

    save(manager, 1, options=ckpt.CheckpointOptions(write_callbacks=[again]))
    assert manager.latest_checkpoint == ckpt.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2")
    assert manager.steps == (1, 2)


def test_a_write_callback_may_save_with_another_manager(tmp_path):
    checkpoint = ckpt.Checkpoint(step=0)
    last = ckpt.CheckpointManager(checkpoint, tmp_path, checkpoint_name="last")
    best = ckpt.CheckpointManager(checkpoint, tmp_path, checkpoint_name="best")
    last.save(5, options=ckpt.CheckpointOptions(write_callbacks=[lambda: best.save(5)]))
    assert names([last.latest_checkpoint, best.latest_checkpoint]) == ["last-5", "best-5"]
