"""A proxy on this machine that stands before an object store and does what networks do.

It counts requests, delays them, cuts connections before or after the server acted, answers in the
server's place, and keeps requests back so that they arrive late. The client signs its requests for
the proxy's address; the proxy passes the `Host` header on as it is, so that signatures stay valid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Literal

from loopback import LoopbackServer

# What requests to GCS's JSON interface begin with; all others are S3's.
_GCS = ("storage/v1/", "upload/storage/v1/")

# No test waits longer than this for another thread.
PATIENCE_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asked for.

    `operation` is one word for S3 and for GCS: "READ", "STAT", "WRITE", "DELETE" or "LIST".
    `key` is the object's name within its bucket; a LIST has the prefix there.
    """

    number: int  # from 1, in the order of arrival
    operation: str
    bucket: str
    key: str
    method: str
    target: str
    headers: dict[str, str]
    body: bytes = dataclasses.field(repr=False)

    @property
    def conditional(self) -> bool:
        return any(name in self.headers for name in ("if-match", "if-none-match")) or (
            "ifGeneration" in self.target
        )

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a request.

    `acts`: the server gets it. `status`: what the client is told instead of the server's reply; 0
    cuts the connection without a word. None leaves the server's reply. `held`: the "request" on
    its way to the server, or the "reply" on its way back, waits until `FaultProxy.release` is
    called. `instead_of`: only if that is what the server replied.
    """

    acts: bool
    status: int | None
    held: Literal["request", "reply"] | None = None
    instead_of: int | None = None


CUT_BEFORE = Fault(acts=False, status=0)
CUT_AFTER = Fault(acts=True, status=0)  # also: the reply is lost
HOLD = Fault(acts=True, status=None, held="request")  # arrives late; never, if not released
HOLD_REPLY = Fault(acts=True, status=None, held="reply")  # the server acted, and nobody hears of it

_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
    507: "InsufficientStorage",
}


def answer(status: int, *, acts: bool = False) -> Fault:
    """An error in place of the server's reply; with `acts`, after the server did as it was told."""
    return Fault(acts, status)


@dataclasses.dataclass
class _Rule:
    fault: Fault
    operation: str | None
    key: str | None
    first: int
    times: int | None
    seen: int = 0

    def takes(self, request: Request) -> bool:
        if self.operation is not None and request.operation not in self.operation.split("|"):
            return False
        if self.key is not None and not re.search(self.key, request.key):
            return False
        self.seen += 1
        return self.seen >= self.first and (
            self.times is None or self.seen < self.first + self.times
        )


class FaultProxy:
    """Stands before the server at `server` (`http://127.0.0.1:port`) until it is closed.

    Example:
        with FaultProxy(server.url) as proxy:
            proxy.fault(answer(503), operation="WRITE", times=2)
            ...  # a client of proxy.url
            assert proxy.count("WRITE") == 3
    """

    def __init__(self, server: str):
        self.server = server
        self.delay_seconds = 0.0
        self.requests: list[Request] = []
        self._rules: list[_Rule] = []
        self._lock = threading.Condition()
        self._released = threading.Event()
        self._held = 0
        self._closed = False
        self._under_way = 0
        self._most_at_once = 0
        self._http = _Server(_Handler, self)

    @property
    def url(self) -> str:
        return self._http.url

    def fault(
        self,
        fault: Fault,
        *,
        operation: str | None = None,
        key: str | None = None,
        first: int = 1,
        times: int | None = None,
    ) -> None:
        """Lets `fault` happen to requests.

        Args:
            fault: `CUT_BEFORE`, `CUT_AFTER`, `HOLD`, `HOLD_REPLY` or `answer(status)`.
            operation: Only to these, as "WRITE" or "WRITE|DELETE".
            key: Only if this pattern is found in the object's name.
            first: The first of those requests that it happens to, from 1 and from now.
            times: To how many; to all that follow by default.

        Of several rules that take a request, the first that was given counts.
        """
        with self._lock:
            self._rules.append(_Rule(fault, operation, key, first, times))

    def dies_at(self, number: int, *, acted: bool) -> None:
        """Cuts the connection at this request, counted from now, and at all that follow."""
        if acted:
            self.fault(CUT_AFTER, first=number, times=1)
            number += 1
        self.fault(CUT_BEFORE, first=number)

    def deny_listing(self) -> None:
        """Permits no LIST. As AWS does, tells nobody either that an object is missing."""
        self.fault(answer(403), operation="LIST")
        self.fault(Fault(acts=True, status=403, instead_of=404), operation="READ|STAT")

    def heal(self) -> None:
        """Takes all faults away. What is held stays held."""
        with self._lock:
            self._rules.clear()

    def forget(self) -> None:
        """Counts from 0 again."""
        with self._lock:
            self.requests.clear()
            self._most_at_once = 0

    def count(self, operation: str | None = None, key: str | None = None) -> int:
        """How many requests came, of one operation and of names in which `key` is found."""
        return len(self.find(operation, key))

    def find(self, operation: str | None = None, key: str | None = None) -> list[Request]:
        with self._lock:
            return [
                request
                for request in self.requests
                if (operation is None or request.operation in operation.split("|"))
                and (key is None or re.search(key, request.key))
            ]

    def operations(self) -> Counter[str]:
        """How many requests came, by operation."""
        with self._lock:
            return Counter(request.operation for request in self.requests)

    @property
    def most_at_once(self) -> int:
        """The largest number of requests that were under way together."""
        return self._most_at_once

    def wait_until_held(self, count: int = 1) -> None:
        with self._lock:
            assert self._lock.wait_for(lambda: self._held >= count, PATIENCE_SECONDS), (
                f"{self._held} requests are held, expected {count}"
            )

    def release(self) -> None:
        """Lets everything that is held go on, and waits until the server has answered all of it.

        A client that gave up in the meantime no longer hears the answer; the server acts all the
        same. What is held by requests that come later waits for the next call.
        """
        with self._lock:
            released, self._released = self._released, threading.Event()
            released.set()
            assert self._lock.wait_for(lambda: self._held == 0, PATIENCE_SECONDS)

    def close(self) -> None:
        """Ends the proxy. Requests that are held never arrive."""
        with self._lock:
            self._closed = True
        self.heal()
        self._http.end()
        self._http.cut_all()
        self.release()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Called by the threads that serve connections.

    def arrived(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Request:
        operation, bucket, key = understand(method, target)
        with self._lock:
            number = len(self.requests) + 1
            request = Request(number, operation, bucket, key, method, target, headers, body)
            self.requests.append(request)
        return request

    def fate(self, request: Request) -> Fault | None:
        with self._lock:
            takers = [rule for rule in self._rules if rule.takes(request)]
        return takers[0].fault if takers else None

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
            self._most_at_once = max(self._most_at_once, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError
            released = self._released
            self._held += 1
            self._lock.notify_all()
        try:
            released.wait()
            if self._closed:
                raise ConnectionAbortedError
            yield
        finally:
            with self._lock:
                self._held -= 1
                self._lock.notify_all()


def understand(method: str, target: str) -> tuple[str, str, str]:
    """Operation, bucket and key of a request to S3 (path style) or to GCS's JSON interface."""
    path, _, query_text = target.partition("?")
    query = urllib.parse.parse_qs(query_text, keep_blank_values=True)
    prefix = (query.get("prefix") or query.get("startOffset") or [""])[0]
    if gcs := re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]*)(?:/o(?:/(.*))?)?", path):
        bucket = gcs[1]
        key = urllib.parse.unquote(gcs[2] or "") or query.get("name", [""])[0]
        if method == "GET" and not key:
            return "LIST", bucket, prefix
        if method == "GET":
            return ("READ" if "media" in query.get("alt", []) else "STAT"), bucket, key
        return {"POST": "WRITE", "DELETE": "DELETE"}.get(method, method), bucket, key
    bucket, _, quoted = path.lstrip("/").partition("/")
    key = urllib.parse.unquote(quoted)
    if method == "GET" and not key:
        return "LIST", bucket, prefix
    operation = {"GET": "READ", "HEAD": "STAT", "PUT": "WRITE", "DELETE": "DELETE"}
    return operation.get(method, method), bucket, key


class _Server(LoopbackServer):
    def __init__(self, *arguments):
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.upstream: http.client.HTTPConnection | None = None

    def finish(self):
        if self.upstream is not None:
            self.upstream.close()
        super().finish()

    def log_message(self, format, *arguments):
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = self.owner.arrived(self.command, self.path, headers, body)
        with self.owner.under_way():
            fault = self.owner.fate(request)
            if self.owner.delay_seconds:
                threading.Event().wait(self.owner.delay_seconds)
            if fault is None:
                self._reply(*self._ask(request))
                return
            with self.owner.holding() if fault.held == "request" else contextlib.nullcontext():
                reply = self._ask(request) if fault.acts else None
            with self.owner.holding() if fault.held == "reply" else contextlib.nullcontext():
                pass
            if fault.status is None or (
                reply is not None and fault.instead_of not in (None, reply[0])
            ):
                assert reply is not None
                self._reply(*reply)
            elif fault.status == 0:
                self._cut()
            else:
                self._reply(*self._error(request, fault))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve

    def _ask(self, request: Request) -> tuple[int, str, list[tuple[str, str]], bytes]:
        for attempt in (1, 2):
            # The server closes a connection that was idle, or was itself restarted: one more try
            # on a fresh one, and only if the old one was used before.
            fresh = self.upstream is None
            if self.upstream is None:
                host = urllib.parse.urlsplit(self.owner.server).netloc
                self.upstream = http.client.HTTPConnection(host)
                try:
                    self.upstream.connect()
                except OSError:
                    self.upstream = None
                    self._cut()
                    raise
                self.upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self.upstream.putrequest(
                    request.method, request.target, skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        self.upstream.putheader(name, value)
                self.upstream.endheaders(request.body or None)
                response = self.upstream.getresponse()
                content = response.read()
                return response.status, response.reason, response.getheaders(), content
            except (OSError, http.client.HTTPException):
                self.upstream.close()
                self.upstream = None
                if fresh or attempt == 2:
                    self._cut()
                    raise
        raise AssertionError

    def _reply(
        self, status: int, reason: str, headers: list[tuple[str, str]], content: bytes
    ) -> None:
        self.send_response_only(status, reason)
        ours = {"transfer-encoding", "connection"}
        if self.command != "HEAD":
            ours.add("content-length")
        for name, value in headers:
            if name.lower() not in ours:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def _error(self, request: Request, fault: Fault):
        code = _CODES[fault.status]
        if request.target.lstrip("/").startswith(_GCS):
            message = {"code": fault.status, "message": "The proxy said so."}
            kind, content = "application/json", json.dumps({"error": message}).encode()
        else:
            kind = "application/xml"
            content = (
                f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
                f"<Message>The proxy said so.</Message>"
                f"<RequestId>{request.number}</RequestId></Error>"
            ).encode()
        return fault.status, code, [("Content-Type", kind)], content

    def _cut(self) -> None:
        """Resets the connection: what the client sees of a server or a network that died."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
