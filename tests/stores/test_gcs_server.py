"""Our own server of GCS's JSON interface, asked without TensorStore."""

import http.client
import json
import urllib.parse

import pytest


@pytest.fixture
def ask(gcs_server):
    gcs_server.make_bucket("b")
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(gcs_server.url).netloc)

    def ask(method, target, body=None, **headers):
        connection.request(method, target, body, {"Authorization": "Bearer x", **headers})
        response = connection.getresponse()
        return response.status, response.read(), response.headers

    yield ask
    connection.close()


UPLOAD = "/upload/storage/v1/b/b/o?uploadType=media&name=a%2Fx"
OBJECT = "/storage/v1/b/b/o/a%2Fx"


def test_preconditions_hold_for_every_operation(ask):
    assert ask("POST", f"{UPLOAD}&ifGenerationMatch=7", b"1")[0] == 412
    status, body, _ = ask("POST", f"{UPLOAD}&ifGenerationMatch=0", b"1")
    assert status == 200
    first = json.loads(body)["generation"]
    assert ask("POST", f"{UPLOAD}&ifGenerationMatch=0", b"2")[0] == 412
    status, body, _ = ask("POST", f"{UPLOAD}&ifGenerationMatch={first}", b"2")
    second = json.loads(body)["generation"]
    assert int(second) > int(first)
    assert ask("GET", f"{OBJECT}?alt=media&ifGenerationNotMatch={second}")[0] == 304
    assert ask("GET", f"{OBJECT}?alt=media&ifGenerationMatch={first}")[0] == 412
    assert ask("DELETE", f"{OBJECT}?ifGenerationMatch={first}")[0] == 412
    status, body, headers = ask("GET", f"{OBJECT}?alt=media")
    assert (status, body, headers["x-goog-generation"]) == (200, b"2", second)
    assert ask("DELETE", f"{OBJECT}?ifGenerationMatch={second}")[0] == 204
    assert ask("GET", OBJECT)[0] == 404


def test_the_same_bytes_again_are_another_generation(ask):
    generations = {json.loads(ask("POST", UPLOAD, b"1")[1])["generation"] for _ in range(3)}
    assert len(generations) == 3


def test_long_lists_come_in_pages(gcs_server, gcs):
    gcs_server.page_size = 3
    kvstore = gcs.kvstore()
    names = [f"{number}" for number in range(8)]
    for name in names:
        kvstore.write(name, b"").result()
    proxy = gcs.through_proxy()
    assert gcs.kvstore().list().result() == [name.encode() for name in names]
    assert proxy.operations() == {"LIST": 3}


def test_nobody_is_served_without_a_token(gcs_server):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(gcs_server.url).netloc)
    connection.request("GET", "/storage/v1/b/b/o")
    assert connection.getresponse().status == 401
    connection.close()


def test_what_is_not_served_is_an_error(ask):
    assert ask("GET", "/storage/v2/b")[0] == 404
    assert ask("GET", "/storage/v1/b/none/o")[0] == 404
    assert ask("PATCH", OBJECT)[0] == 405
