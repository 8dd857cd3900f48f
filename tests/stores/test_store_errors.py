"""What a store refuses or does not answer is an OSError of its kind, with words that help.

It is never taken for damage, nor for a checkpoint that is not there.
"""

import numpy as np
import pytest
from fault_proxy import CUT_BEFORE, HOLD, answer
from store_servers import READER_KEY, READER_SECRET

import ckpt_jax as ckpt
from ckpt_jax.api.latest import remove_checkpoint
from ckpt_jax.store import attempts, objects
from ckpt_jax.store.directory import checkpoints_in

TREE = {"w": np.arange(3.0)}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(attempts, "_DOUBT_SECONDS", 0.0)
    monkeypatch.setattr(objects, "_WAITS", {"initial_delay": "5ms", "max_delay": "20ms"})


def acts(url):
    """What a program does with a place, by name. There is a checkpoint `a` and a manager's."""
    return {
        "save": lambda: ckpt.save(f"{url}/new", TREE),
        "overwrite": lambda: ckpt.save(f"{url}/a", TREE, overwrite=True),
        "load": lambda: ckpt.load(f"{url}/a"),
        "restore": lambda: ckpt.restore(f"{url}/a", TREE),
        "latest_checkpoint": lambda: ckpt.latest_checkpoint(url),
        "numbered": lambda: ckpt.Checkpoint(**TREE).save(f"{url}/n"),
        "manager": lambda: manager_of(url).save(),
        "restore_or_initialize": lambda: manager_of(url).restore_or_initialize(),
        "verify": lambda: ckpt.verify(f"{url}/a"),
        "remove": lambda: remove_checkpoint(f"{url}/a"),
    }


ACTS = [*acts("")]
READS = ["load", "restore", "latest_checkpoint", "verify"]


def manager_of(url):
    return ckpt.CheckpointManager(ckpt.Checkpoint(**TREE), url)


def fill(url):
    ckpt.save(f"{url}/a", TREE)
    manager_of(url).save()


def raised_by(act, url, kinds=OSError):
    """The error of an act, which names the place. `preflight` has its own, with the same words."""
    with pytest.raises((kinds, ckpt.PreflightError)) as caught:
        acts(url)[act]()
    assert url in str(caught.value)
    return caught.value


@pytest.fixture
def proxy(a_server):
    fill(a_server.url)
    ckpt.use_storage(a_server.url, retries=2, request_timeout_seconds=60)
    return a_server.through_proxy()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("status", [503, 409])
def test_a_storm_of_errors_says_so_and_changes_nothing(act, status, gcs, proxy_of):
    proxy = proxy_of(gcs)
    proxy.fault(answer(status))
    error = raised_by(act, gcs.url)
    assert str(status) in str(error) and "try again later" in str(error)
    assert not isinstance(error, FileNotFoundError | PermissionError)
    proxy.heal()
    assert checkpoints_in(gcs.url) == ["ckpt-1", "a"]
    assert ckpt.verify(f"{gcs.url}/a").ok


@pytest.fixture
def proxy_of():
    def proxy_of(place):
        fill(place.url)
        ckpt.use_storage(place.url, retries=2, request_timeout_seconds=60)
        return place.through_proxy()

    return proxy_of


@pytest.mark.parametrize("act", ["save", "load", "manager", "latest_checkpoint"])
@pytest.mark.parametrize("status", [503, 429, 500])
def test_errors_in_passing_are_not_noticed(act, status, a_server, proxy):
    proxy.fault(answer(status), first=2, times=1)
    proxy.fault(answer(status), first=4, times=2)
    acts(a_server.url)[act]()


def test_a_request_is_tried_as_often_as_was_set(a_server, proxy):
    proxy.fault(answer(503))
    raised_by("load", a_server.url)
    assert proxy.count("READ") == 3


@pytest.mark.parametrize("act", ACTS)
def test_a_connection_that_is_refused_is_said_to_be(act, moto, proxy_of):
    proxy_of(moto).close()
    assert "Could not connect" in str(raised_by(act, moto.url))


@pytest.mark.parametrize("act", READS)
def test_a_connection_that_is_reset_is_no_damage(act, a_server, proxy):
    proxy.fault(CUT_BEFORE)
    assert "try again later" in str(raised_by(act, a_server.url))


def test_data_that_cannot_be_fetched_are_not_called_damaged(a_server, proxy):
    for fault in (answer(503), answer(403), CUT_BEFORE):
        proxy.heal()
        proxy.fault(fault, operation="READ", key="/shards/")
        for act in ("load", "restore", "verify"):
            raised_by(act, a_server.url)


@pytest.mark.parametrize("act", ["save", "load", "latest_checkpoint", "restore_or_initialize"])
def test_a_server_that_hangs_is_given_up(act, a_server, proxy):
    ckpt.use_storage(a_server.url, retries=0, request_timeout_seconds=0.2)
    proxy.fault(HOLD)
    error = raised_by(act, a_server.url)
    assert "within 0.2 s" in str(error) and "request_timeout_seconds" in str(error)
    proxy.heal()
    proxy.release()


def test_by_default_an_error_that_stays_is_reported_within_two_minutes():
    settings = objects.settings_of("s3://bucket/a")
    assert settings.request_timeout_seconds <= 60
    assert attempts._PAUSE_SECONDS < 1


@pytest.mark.parametrize("act", ACTS)
def test_who_may_do_nothing_gets_a_permission_error(act, a_server, proxy):
    proxy.fault(answer(403))
    error = raised_by(act, a_server.url, PermissionError)
    assert "refuses" in str(error) and "credentials" in str(error)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("key", "secret", "word"),
    [
        ("nobody", "nothing", "InvalidAccessKeyId"),
        ("tests", "another", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials_are_a_permission_error(act, key, secret, word, s3, monkeypatch):
    fill(s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert word in str(raised_by(act, s3.url, PermissionError))


def test_credentials_that_end_are_noticed_by_a_program_that_had_read_before(any_s3, proxy_of):
    """What is not shown any more is not taken for absent."""
    proxy = proxy_of(any_s3)
    manager = manager_of(any_s3.url)
    proxy.fault(answer(403), operation="READ|WRITE|LIST", key=".")
    with pytest.raises(PermissionError):
        manager.save()


@pytest.mark.parametrize("act", ["save", "overwrite", "numbered", "manager", "remove"])
def test_a_reader_may_not_write(act, s3, monkeypatch):
    fill(s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    for read in READS:
        acts(s3.url)[read]()
    raised_by(act, s3.url, PermissionError)
    assert checkpoints_in(s3.url) == ["ckpt-1", "a"]


@pytest.mark.parametrize("act", ACTS)
def test_a_missing_bucket_is_said_to_be_missing(act, any_s3):
    url = "s3://there-is-none/run"
    error = raised_by(act, url, objects.NoSuchBucketError)
    assert "no such bucket: 'there-is-none'" in str(error)


@pytest.mark.parametrize("act", ["save", "numbered", "restore_or_initialize", "manager"])
def test_a_missing_bucket_is_said_to_be_missing_by_google_if_something_is_written(act, gcs):
    error = raised_by(act, "gs://there-is-none/run", objects.NoSuchBucketError)
    assert "no such bucket: 'there-is-none'" in str(error)


def test_a_google_bucket_that_is_missing_or_closed_may_be_the_reason_why_nothing_is_found(gcs):
    """Google's stores do not tell, but the error does."""
    with pytest.raises(ckpt.CheckpointNotFoundError, match="or there is no such bucket"):
        ckpt.load("gs://there-is-none/run/a")


# --- permissions that the save path does without --------------------------------------------


@pytest.fixture(params=["no DELETE", "no LIST", "neither"])
def restricted(request, a_server):
    proxy = a_server.through_proxy()
    if request.param != "no DELETE":
        proxy.deny_listing()
    if request.param != "no LIST":
        proxy.fault(answer(403), operation="DELETE")
    return a_server


def test_without_delete_and_list_all_saves_and_restores_work(restricted):
    url = restricted.url
    path = ckpt.save(f"{url}/a", {"w": np.zeros(3)})
    with pytest.raises(FileExistsError):
        ckpt.save(path, {"w": np.ones(3)})
    ckpt.save(path, {"w": np.ones(3)}, overwrite=True)
    assert ckpt.load(path)["w"].tolist() == [1, 1, 1]
    checkpoint = ckpt.Checkpoint(w=np.zeros(3))
    for step in (1, 2, 3):
        path = checkpoint.save(f"{url}/numbered/n", w=np.full(3, float(step)))
    assert ckpt.latest_checkpoint(f"{url}/numbered") == path
    assert ckpt.load(path)["w"].tolist() == [3, 3, 3]
    manager = ckpt.CheckpointManager(
        ckpt.Checkpoint(w=np.zeros(3)), f"{url}/managed", max_to_keep=2
    )
    assert manager.restore_or_initialize() is None
    for step in (1, 2, 3):
        path = manager.save(metrics={"loss": step}, w=np.full(3, float(step)))
    again = ckpt.CheckpointManager(ckpt.Checkpoint(w=np.zeros(3)), f"{url}/managed", max_to_keep=2)
    assert again.restore_or_initialize() == path == again.latest_checkpoint
    assert again.checkpoint.w.tolist() == [3, 3, 3]
    assert ckpt.verify(path).ok
    again.save()
    with pytest.raises(ckpt.SupersededError):
        manager.save()


def test_without_delete_and_list_a_save_that_fails_says_why(a_server):
    proxy = a_server.through_proxy()
    proxy.deny_listing()
    proxy.fault(answer(403), operation="DELETE")
    proxy.fault(answer(507), operation="WRITE", key="/meta/")
    with pytest.raises(OSError, match="507"):
        ckpt.save(f"{a_server.url}/a", TREE)
    with pytest.raises(ckpt.CheckpointNotFoundError):
        ckpt.load(f"{a_server.url}/a")


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("s3://b", {"endpoint": "localhost:9000"}),
        ("s3://b", {"endpoint": "s3://b"}),
        ("gs://b", {"endpoint": "https://host"}),
        ("s3://b", {"retries": -1}),
        ("s3://b", {"request_timeout_seconds": 0}),
        ("/tmp/b", {}),
    ],
)
def test_settings_that_cannot_be_right_are_refused_when_they_are_given(url, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong), "prefix")):
        ckpt.use_storage(url, **wrong)
