"""The proxy does to requests what it says, and stores and TensorStore take it as expected."""

import time

import pytest
from fault_proxy import CUT_AFTER, CUT_BEFORE, HOLD, HOLD_REPLY, answer, understand

ABSENT = b"\x02"
REFUSED = b""


@pytest.fixture
def proxy(any_server):
    return any_server.through_proxy()


@pytest.fixture
def kvstore(proxy, any_server):
    return any_server.kvstore()


@pytest.fixture
def beside(any_server):
    """The same place, past the proxy."""
    there = any_server.endpoint
    any_server.point_at(any_server.server.url)
    kvstore = any_server.kvstore()
    any_server.point_at(there)
    return kvstore


@pytest.mark.parametrize(
    ("method", "target", "understood"),
    [
        ("GET", "/b/a/x%20y", ("READ", "b", "a/x y")),
        ("HEAD", "/b/x", ("STAT", "b", "x")),
        ("PUT", "/b/x", ("WRITE", "b", "x")),
        ("DELETE", "/b/x", ("DELETE", "b", "x")),
        ("GET", "/b/?list-type=2&prefix=a%2F", ("LIST", "b", "a/")),
        ("GET", "/b?list-type=2", ("LIST", "b", "")),
        ("GET", "/storage/v1/b/b/o/a%2Fx?alt=media", ("READ", "b", "a/x")),
        ("GET", "/storage/v1/b/b/o/a%2Fx?alt=json", ("STAT", "b", "a/x")),
        ("POST", "/upload/storage/v1/b/b/o?uploadType=media&name=a%2Fx", ("WRITE", "b", "a/x")),
        ("DELETE", "/storage/v1/b/b/o/a%2Fx", ("DELETE", "b", "a/x")),
        ("GET", "/storage/v1/b/b/o?startOffset=a%2F", ("LIST", "b", "a/")),
    ],
)
def test_requests_are_understood(method, target, understood):
    assert understand(method, target) == understood


def test_requests_are_counted_by_operation_and_name(proxy, kvstore):
    for key in ("a", "b", "b"):
        kvstore.write(key, b"").result()
    assert kvstore["a"] == b""
    assert proxy.operations() == {"WRITE": 3, "READ": 1}
    assert (proxy.count(), proxy.count("WRITE"), proxy.count("WRITE", "b$")) == (4, 3, 2)
    proxy.forget()
    assert proxy.count() == 0


def test_a_connection_is_cut_before_the_server_acted(proxy, kvstore, beside):
    proxy.fault(CUT_BEFORE)
    with pytest.raises(ValueError, match="^ABORTED: All 3 retry attempts failed: CURL error"):
        kvstore.write("a", b"").result()
    assert proxy.count() == 4
    assert beside.list().result() == []


def test_a_connection_is_cut_after_the_server_acted(proxy, kvstore, beside):
    proxy.fault(CUT_AFTER)
    with pytest.raises(ValueError, match="^ABORTED: All 3 retry attempts failed: CURL error"):
        kvstore.write("a", b"1", if_equal=ABSENT).result()
    assert beside["a"] == b"1"


def test_a_lost_reply_looks_like_a_lost_race(proxy, kvstore, beside):
    proxy.fault(CUT_AFTER, times=1)
    assert kvstore.write("a", b"1", if_equal=ABSENT).result().generation == REFUSED
    assert proxy.count("WRITE") == 2
    assert beside["a"] == b"1"


def test_a_lost_reply_at_a_replacement_looks_like_a_lost_race(proxy, kvstore, beside):
    old = beside.write("a", b"1").result().generation
    proxy.fault(answer(500, acts=True), times=1)
    assert kvstore.write("a", b"2", if_equal=old).result().generation == REFUSED
    assert beside["a"] == b"2"


def test_from_some_request_on_nothing_goes_through(proxy, kvstore, beside):
    proxy.dies_at(2, acted=True)
    kvstore.write("a", b"").result()
    for key in ("b", "c"):
        with pytest.raises(ValueError, match="^ABORTED: "):
            kvstore.write(key, b"").result()
    assert beside.list().result() == [b"a", b"b"]


def test_from_some_request_on_the_server_does_not_act(proxy, kvstore, beside):
    proxy.dies_at(2, acted=False)
    kvstore.write("a", b"").result()
    with pytest.raises(ValueError, match="^ABORTED: "):
        kvstore.write("b", b"").result()
    assert beside.list().result() == [b"a"]
    proxy.heal()
    kvstore.write("b", b"").result()
    assert beside.list().result() == [b"a", b"b"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_stores_are_asked_again(proxy, kvstore, status):
    proxy.fault(answer(status), times=2)
    kvstore.write("a", b"1", if_equal=ABSENT).result()
    assert proxy.count("WRITE") == 3
    proxy.fault(answer(status))
    for operation in (lambda: kvstore.read("a"), kvstore.list, lambda: kvstore.write("a", b"2")):
        with pytest.raises(ValueError, match="^ABORTED: All 3 retry attempts failed: ") as caught:
            operation().result()
        assert f"http_response_code='{status}'" in str(caught.value)


def test_a_denied_operation_leaves_the_others(proxy, kvstore):
    proxy.fault(answer(403), operation="DELETE")
    kvstore.write("a", b"1").result()
    with pytest.raises(ValueError, match="^PERMISSION_DENIED: "):
        kvstore.write("a", None).result()
    assert kvstore["a"] == b"1"


def test_faults_happen_to_the_names_and_numbers_that_were_chosen(proxy, kvstore, beside):
    proxy.fault(answer(403), operation="WRITE", key="/state$", first=2, times=1)
    kvstore.write("other", b"").result()
    kvstore.write("state", b"1").result()
    with pytest.raises(ValueError, match="^PERMISSION_DENIED: "):
        kvstore.write("state", b"2").result()
    kvstore.write("state", b"3").result()
    assert beside["state"] == b"3"


def test_a_request_that_timed_out_arrives_late(proxy, kvstore, beside):
    proxy.fault(HOLD, times=1)
    with pytest.raises(TimeoutError):
        kvstore.write("a", b"late", if_equal=ABSENT).result(timeout=0.1)
    proxy.wait_until_held()
    assert beside.list().result() == []
    proxy.release()
    assert beside["a"] == b"late"


def test_a_reply_that_does_not_come_does_not_undo_the_request(proxy, kvstore, beside):
    proxy.fault(HOLD_REPLY, times=1)
    written = kvstore.write("a", b"1", if_equal=ABSENT)
    proxy.wait_until_held()
    with pytest.raises(TimeoutError):
        written.result(timeout=0.1)
    assert beside["a"] == b"1"
    proxy.release()
    assert written.result().generation != REFUSED


def test_what_is_held_when_the_proxy_is_closed_never_arrives(proxy, kvstore, beside):
    proxy.fault(HOLD)
    written = kvstore.write("a", b"1")
    proxy.wait_until_held()
    proxy.close()
    with pytest.raises(ValueError, match="^ABORTED: All 3 retry attempts failed"):
        written.result()
    assert beside.list().result() == []


def test_a_request_that_is_held_does_not_hold_up_others(proxy, kvstore, beside):
    proxy.fault(HOLD, key="/slow$")
    slow = kvstore.write("slow", b"")
    proxy.wait_until_held()
    kvstore.write("fast", b"").result()
    assert beside.list().result() == [b"fast"]
    proxy.release()
    slow.result()
    assert beside.list().result() == [b"fast", b"slow"]


def test_delayed_requests_wait_beside_each_other(proxy, kvstore):
    proxy.delay_seconds = 0.1
    began = time.monotonic()
    for written in [kvstore.write(str(number), b"") for number in range(4)]:
        written.result()
    assert time.monotonic() - began >= proxy.delay_seconds
    assert proxy.most_at_once > 1


def test_large_bodies_pass(proxy, kvstore, beside):
    data = bytes(range(256)) * (32 << 10)
    kvstore.write("a", data).result()
    assert proxy.requests[0].body == data
    assert beside["a"] == data
    assert kvstore["a"] == data


def test_two_servers_are_used_at_once(moto, gcs):
    there, here = moto.through_proxy(), gcs.through_proxy()
    moto.kvstore().write("a", b"1").result()
    gcs.kvstore().write("a", b"2").result()
    assert (moto.kvstore()["a"], gcs.kvstore()["a"]) == (b"1", b"2")
    assert there.operations() == here.operations() == {"WRITE": 1, "READ": 1}
