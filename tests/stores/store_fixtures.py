"""Fixtures: fresh places in object stores, each of a server on this machine.

`s3` (SeaweedFS), `moto`, `gcs` and `memory` give a `Place`; `any_store` runs a test on each of
them. The variables of the environment that lead there are set for the test alone. One server of a
kind runs per session, or per worker of pytest-xdist.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tensorstore as ts
from fault_proxy import FaultProxy
from gcs_server import GcsServer
from store_servers import KEY, REGION, SECRET, Moto, S3Server, Seaweed, program

BUCKET = "bucket-of-tests"

# Errors must not take as long as they may in earnest.
_RETRIES = {"max_retries": 3, "initial_delay": "5ms", "max_delay": "20ms"}


class Place:
    """A place in a store that nothing else uses.

    `url` has no slash at its end: `f"{place.url}/ckpt-1"` is a checkpoint there. `server` is what
    serves it, and None for `memory`; `bucket` and `key` say where it is there.
    """

    def __init__(
        self,
        scheme: str,
        server: S3Server | GcsServer | None,
        patch: pytest.MonkeyPatch,
        finalizer: Callable[[Callable[[], None]], None],
        bucket: str = BUCKET,
    ):
        self.scheme = scheme
        self.server = server
        self.bucket = bucket
        self.key = f"run-{uuid.uuid4().hex[:12]}"
        self._patch = patch
        self._finalizer = finalizer
        self._context = ts.Context({"memory_key_value_store": {}})
        if server is not None:
            patch.setenv("NO_PROXY", "127.0.0.1")
            self.point_at(server.url)
        if scheme == "s3":
            patch.setenv("AWS_ACCESS_KEY_ID", KEY)
            patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            patch.setenv("AWS_REGION", REGION)
            # What the user's own files say is not for tests.
            patch.setenv("AWS_CONFIG_FILE", os.devnull)
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
            for other in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
                patch.delenv(other, raising=False)

    @property
    def url(self) -> str:
        if self.scheme == "memory":
            return f"memory://{self.key}"
        return f"{'gs' if self.scheme == 'gcs' else 's3'}://{self.bucket}/{self.key}"

    def point_at(self, endpoint: str) -> None:
        """Lets the variables of the environment lead to `endpoint`."""
        variable = {"s3": "AWS_ENDPOINT_URL_S3", "gcs": "TENSORSTORE_GCS_HTTP_URL"}[self.scheme]
        self.endpoint = endpoint
        self._patch.setenv(variable, endpoint)

    def through_proxy(self) -> FaultProxy:
        """Puts a proxy before the server, for whatever is opened from now on in this test.

        TensorStore remembers open stores: what was opened before may go on past the proxy.
        """
        assert self.server is not None, "memory:// sends no requests"
        proxy = FaultProxy(self.server.url)
        self._finalizer(proxy.close)
        self.point_at(proxy.url)
        return proxy

    def kvstore(self, path: str = "", **options: Any) -> ts.KvStore:
        """What TensorStore itself finds in this place, or below `path` there.

        `options` go into the specification: another `bucket`, say.
        """
        key = f"{self.key}/{path}"
        if self.scheme == "memory":
            return ts.KvStore.open(
                {"driver": "memory", "path": key, **options}, context=self._context
            ).result()
        specification = {"driver": self.scheme, "bucket": self.bucket, "path": key}
        if self.scheme == "s3":
            specification |= {
                "endpoint": self.endpoint,
                "aws_region": REGION,
                "aws_credentials": {"type": "environment"},
                "use_conditional_write": True,
            }
        # A context of its own: with a shared one, TensorStore would return an open store as it is,
        # with the address and the credentials that it had then.
        context = ts.Context({f"{self.scheme}_request_retries": _RETRIES})
        return ts.KvStore.open({**specification, **options}, context=context).result()


def _running(name: str, kind: type[S3Server]) -> Iterator[S3Server]:
    """A server with the bucket of the tests; they are skipped if its program is not here."""
    if program(name) is None:
        pytest.skip(f"{name} is not installed (pip install 'ckpt-jax[test]')")
    pytest.importorskip("boto3", reason="boto3 is not installed (pip install 'ckpt-jax[test]')")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        server = kind(pathlib.Path(directory) / "server")
        try:
            server.start()
            server.make_bucket(BUCKET)
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="session")
def seaweed_server() -> Iterator[S3Server]:
    yield from _running("weed", Seaweed)


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    yield from _running("moto_server", Moto)


@pytest.fixture
def own_seaweed() -> Iterator[S3Server]:
    """A server for one test, which may kill it and start it again. Both take their time."""
    yield from _running("weed", Seaweed)


@pytest.fixture
def gcs_server() -> Iterator[GcsServer]:
    server = GcsServer()
    server.make_bucket(BUCKET)
    yield server
    server.close()


@pytest.fixture
def s3(seaweed_server, monkeypatch, request) -> Place:
    """A place in SeaweedFS: conditions, signatures and permissions are checked."""
    return Place("s3", seaweed_server, monkeypatch, request.addfinalizer)


@pytest.fixture
def moto(moto_server, monkeypatch, request) -> Place:
    """A place in moto: conditions are checked; quick to start."""
    return Place("s3", moto_server, monkeypatch, request.addfinalizer)


@pytest.fixture
def gcs(gcs_server, monkeypatch, request) -> Place:
    """A place in our own server of GCS's JSON interface."""
    return Place("gcs", gcs_server, monkeypatch, request.addfinalizer)


@pytest.fixture
def memory(monkeypatch, request) -> Place:
    """A place in this process's memory."""
    return Place("memory", None, monkeypatch, request.addfinalizer)


@pytest.fixture(params=["memory", "moto", "s3", "gcs"])
def any_store(request) -> Place:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["moto", "s3", "gcs"])
def any_server(request) -> Place:
    """A place in each store that is reached by requests, so that a proxy can stand before it."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["moto", "gcs", pytest.param("s3", marks=pytest.mark.slow)])
def a_server(request) -> Place:
    """`any_server`, of which the slow one is left out by default."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["moto", "s3"])
def any_s3(request) -> Place:
    return request.getfixturevalue(request.param)
