"""What the library relies on, of TensorStore and of each store that tests run on.

A test here that fails with a new TensorStore or a new server says which promise is gone.
"""

import threading

import pytest
import tensorstore as ts
from store_servers import READER_KEY, READER_SECRET

ABSENT = b"\x02"
REFUSED = b""


def generation(kvstore, key):
    return kvstore.read(key).result().stamp.generation


def test_an_object_is_created_once(any_store):
    kvstore = any_store.kvstore()
    first = kvstore.write("a", b"first", if_equal=ABSENT).result()
    second = kvstore.write("a", b"second", if_equal=ABSENT).result()
    assert first.generation not in (REFUSED, ABSENT)
    assert second.generation == REFUSED
    assert kvstore["a"] == b"first"


def test_one_of_many_creators_wins(any_store):
    writers = range(8)
    start = threading.Barrier(len(writers))
    got = {}

    def create(writer):
        kvstore = any_store.kvstore()
        start.wait()
        got[writer] = kvstore.write("a", b"%d" % writer, if_equal=ABSENT).result().generation

    threads = [threading.Thread(target=create, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # In memory nothing is shared but by the context, which is one per place.
    (winner,) = [writer for writer in writers if got[writer] != REFUSED]
    assert any_store.kvstore()["a"] == b"%d" % winner


def test_a_replacement_needs_the_generation_that_is_there(any_store):
    kvstore = any_store.kvstore()
    old = kvstore.write("a", b"old").result().generation
    new = kvstore.write("a", b"new", if_equal=old).result().generation
    assert new not in (REFUSED, ABSENT, old)
    assert kvstore.write("a", b"lost update", if_equal=old).result().generation == REFUSED
    assert kvstore["a"] == b"new"


def test_nothing_is_replaced_where_nothing_is(any_store):
    kvstore = any_store.kvstore()
    old = kvstore.write("a", b"old").result().generation
    kvstore.write("a", None).result()
    assert kvstore.write("a", b"new", if_equal=old).result().generation == REFUSED
    assert kvstore.read("a").result().state == "missing"


def test_what_was_written_is_listed_at_once(any_store):
    kvstore = any_store.kvstore()
    kvstore.write("ckpt-7/root", b"").result()
    kvstore.write("ckpt-70/root", b"").result()
    assert kvstore.list().result() == [b"ckpt-7/root", b"ckpt-70/root"]
    assert any_store.kvstore("ckpt-7/").list().result() == [b"root"]
    kvstore.write("ckpt-7/root", None).result()
    assert kvstore.list().result() == [b"ckpt-70/root"]


def test_a_range_is_removed_and_its_neighbours_stay(any_store):
    kvstore = any_store.kvstore()
    for key in ("ckpt-6/x", "ckpt-7/x", "ckpt-7/y/z", "ckpt-70/x"):
        kvstore.write(key, b"").result()
    kvstore.delete_range(ts.KvStore.KeyRange("ckpt-7/", "ckpt-70")).result()
    assert kvstore.list().result() == [b"ckpt-6/x", b"ckpt-70/x"]


def test_names_may_have_any_character(any_store):
    kvstore = any_store.kvstore()
    key = "a b/ü+%/&=?#"
    kvstore.write(key, b"1").result()
    assert kvstore[key] == b"1"
    assert kvstore.list().result() == [key.encode()]


def test_bytes_are_read_by_their_places(any_store):
    kvstore = any_store.kvstore()
    kvstore.write("a", b"0123456789").result()

    def read(first, last):
        return kvstore.read("a", byte_range=slice(first, last)).result().value

    assert read(2, 5) == b"234"
    assert read(7, None) == b"789"
    assert read(-3, None) == b"789"
    assert read(4, 4) == b""


@pytest.mark.parametrize("places", [slice(5, 20), slice(20, 30)])
def test_bytes_beyond_the_end_are_an_error(any_store, places):
    kvstore = any_store.kvstore()
    kvstore.write("a", b"0123456789").result()
    with pytest.raises(ValueError, match="^OUT_OF_RANGE: "):
        kvstore.read("a", byte_range=places).result()


def test_a_large_object_comes_back(any_store):
    kvstore = any_store.kvstore()
    data = bytes(range(256)) * (16 << 10)
    kvstore.write("a", data).result()
    assert kvstore["a"] == data


def test_a_copy_is_not_offered(any_store):
    kvstore = any_store.kvstore()
    with pytest.raises(NotImplementedError, match="CopyRange not supported"):
        kvstore.experimental_copy_range_to(any_store.kvstore("other/")).result()


# Requests.


def test_each_operation_is_one_request(any_server):
    proxy = any_server.through_proxy()
    kvstore = any_server.kvstore()
    kvstore.write("a", b"0123456789", if_equal=ABSENT).result()
    kvstore.write("a", b"9876543210", if_equal=generation(kvstore, "a")).result()
    kvstore.read("a", byte_range=slice(2, 5)).result()
    kvstore.list().result()
    kvstore.write("a", None).result()
    assert [request.operation for request in proxy.requests] == [
        *("WRITE", "READ", "WRITE", "READ", "LIST", "DELETE")
    ]
    assert [request.conditional for request in proxy.find("WRITE")] == [True, True]
    assert [request.range for request in proxy.find("READ")] == [None, "bytes=2-4"]


def test_a_range_is_removed_by_a_list_and_deletes(any_server):
    kvstore = any_server.kvstore()
    for number in range(4):
        kvstore.write(f"d/{number}", b"").result()
    proxy = any_server.through_proxy()
    kvstore = any_server.kvstore()
    kvstore.delete_range(ts.KvStore.KeyRange("d/", "d0")).result()
    assert proxy.operations() == {"LIST": 1, "DELETE": 4}


def test_whole_shards_are_written_without_being_read(any_server):
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    sharding = {"chunk_shape": [16], "codecs": codecs, "index_codecs": codecs}
    metadata = {
        "shape": [64],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [32]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    proxy = any_server.through_proxy()
    base = any_server.kvstore("array/").spec().to_json()
    transaction = ts.Transaction()
    array = ts.open(
        {"driver": "zarr3", "kvstore": base, "metadata": metadata},
        open=True,
        assume_metadata=True,
        transaction=transaction,
    ).result()
    array.write([1.0] * 64).result()
    assert proxy.requests == []
    transaction.commit_async().result()
    assert proxy.operations() == {"WRITE": 2}


# Errors.


def test_only_a_list_or_a_write_tells_that_an_s3_bucket_is_missing(any_s3):
    kvstore = any_s3.kvstore(bucket="there-is-none")
    assert kvstore.read("a").result().state == "missing"
    # Just as if somebody else had been faster.
    assert kvstore.write("a", b"", if_equal=ABSENT).result().generation == REFUSED
    assert kvstore.write("a", None).result().generation == ABSENT
    for operation in (kvstore.list, lambda: kvstore.write("a", b"")):
        with pytest.raises(ValueError, match="^NOT_FOUND: NoSuchBucket: "):
            operation().result()


def test_only_a_write_tells_that_a_gcs_bucket_is_missing(gcs):
    kvstore = gcs.kvstore(bucket="there-is-none")
    assert kvstore.read("a").result().state == "missing"
    assert kvstore.list().result() == []
    with pytest.raises(ValueError, match="^NOT_FOUND: The specified bucket does not exist"):
        kvstore.write("a", b"", if_equal=ABSENT).result()


def test_gcs_lists_nothing_if_listing_is_denied(gcs):
    gcs.kvstore().write("a", b"").result()
    gcs.through_proxy().deny_listing()
    assert gcs.kvstore().list().result() == []


def test_s3_says_if_listing_is_denied(any_s3):
    any_s3.kvstore().write("a", b"").result()
    any_s3.through_proxy().deny_listing()
    kvstore = any_s3.kvstore()
    with pytest.raises(ValueError, match="^PERMISSION_DENIED: AccessDenied: "):
        kvstore.list().result()
    assert kvstore["a"] == b""
    with pytest.raises(ValueError, match="^PERMISSION_DENIED: AccessDenied: "):
        kvstore.read("missing").result()


@pytest.mark.parametrize(
    ("key", "secret", "word"),
    [
        ("nobody", "nothing", "InvalidAccessKeyId"),
        ("tests", "another", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials_are_refused_at_once(s3, monkeypatch, key, secret, word):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    proxy = s3.through_proxy()
    kvstore = s3.kvstore()
    for operation in (
        lambda: kvstore.read("a"),
        kvstore.list,
        lambda: kvstore.write("a", b"", if_equal=ABSENT),
        lambda: kvstore.write("a", None),
    ):
        proxy.forget()
        with pytest.raises(ValueError, match=f"^PERMISSION_DENIED: {word}: "):
            operation().result()
        assert proxy.count() == 1


def test_a_reader_may_not_write(s3, monkeypatch):
    s3.kvstore().write("a", b"1").result()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    kvstore = s3.kvstore()
    assert kvstore["a"] == b"1"
    assert kvstore.list().result() == [b"a"]
    for value in (b"2", None):
        with pytest.raises(ValueError, match="^PERMISSION_DENIED: AccessDenied: "):
            kvstore.write("a", value).result()


def test_a_refused_connection_is_aborted(any_server):
    proxy = any_server.through_proxy()
    proxy.close()
    with pytest.raises(
        ValueError, match=r"^ABORTED: All 3 retry attempts failed: CURL error Could not connect .*7"
    ):
        any_server.kvstore().read("a").result()


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill(own_seaweed, monkeypatch, request):
    from store_fixtures import Place

    place = Place("s3", own_seaweed, monkeypatch, request.addfinalizer)
    place.kvstore().write("a", b"1").result()
    own_seaweed.kill()
    with pytest.raises(ValueError, match="^ABORTED: .*Could not connect"):
        place.kvstore().read("a").result()
    own_seaweed.start()
    kvstore = place.kvstore()
    assert kvstore["a"] == b"1"
    assert kvstore.write("a", b"2", if_equal=ABSENT).result().generation == REFUSED
