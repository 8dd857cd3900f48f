"""A server of Google Cloud Storage's JSON interface, as far as TensorStore uses it, for tests.

Objects lie in memory. Generations are numbers that only grow, as they are there; preconditions are
checked and acted upon under one lock. Nothing but 127.0.0.1 is listened on.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import LoopbackServer

LARGEST_PAGE = 1000


class GcsServer:
    """Serves at `url` until it is closed. `page_size` bounds what one LIST returns. With
    `ignores_conditions` it is a store that cannot hold checkpoints safely."""

    def __init__(self, page_size: int = LARGEST_PAGE):
        self.page_size = page_size
        self.ignores_conditions = False
        self.buckets: dict[str, dict[str, tuple[bytes, int]]] = {}
        self.lock = threading.Lock()
        self._generation = 1_700_000_000_000_000
        self._http = LoopbackServer(_Handler, self)

    @property
    def url(self) -> str:
        return self._http.url

    def make_bucket(self, name: str) -> None:
        with self.lock:
            self.buckets.setdefault(name, {})

    def next_generation(self) -> int:
        self._generation += 1
        return self._generation

    def close(self) -> None:
        self._http.end()


class _Refused(Exception):
    def __init__(self, status: int, message: str):
        self.status = status
        self.message = message


class _Handler(BaseHTTPRequestHandler):
    owner: GcsServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format, *arguments):
        pass

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        try:
            if "Authorization" not in self.headers:
                raise _Refused(401, "Anonymous caller does not have storage access.")
            match = re.fullmatch(r"(/upload)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
            if match is None:
                raise _Refused(404, f"Nothing is served at {path}.")
            with self.owner.lock:
                bucket = self.owner.buckets.get(match[2])
                if bucket is None:
                    raise _Refused(404, "The specified bucket does not exist.")
                reply = self._act(match[1] is not None, match[2], bucket, match[3])
        except _Refused as refused:
            error = {"code": refused.status, "message": refused.message}
            reply = (refused.status, {}, json.dumps({"error": error}).encode())
        self._reply(*reply)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = do_HEAD = _serve

    def _act(
        self, upload: bool, name: str, bucket: dict[str, tuple[bytes, int]], quoted: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        if self.command == "POST" and upload and self.query.get("uploadType") == "media":
            return self._write(name, bucket, self.query["name"])
        if self.command == "GET" and quoted is None and not upload:
            return self._list(name, bucket)
        if quoted is None or upload:
            raise _Refused(405, f"{self.command} {self.path} is not served here.")
        key = urllib.parse.unquote(quoted)
        if self.command == "GET":
            return self._read(name, bucket, key)
        if self.command == "DELETE":
            self._check(bucket, key)
            if key not in bucket:
                raise _Refused(404, f"No such object: {name}/{key}")
            del bucket[key]
            return 204, {}, b""
        raise _Refused(405, f"{self.command} {self.path} is not served here.")

    def _check(self, bucket: dict[str, tuple[bytes, int]], key: str) -> None:
        """Preconditions: generation 0 stands for an object that is not there."""
        generation = bucket[key][1] if key in bucket else 0
        wanted = self.query.get("ifGenerationMatch")
        if self.owner.ignores_conditions:
            return
        if wanted is not None and int(wanted) != generation:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
        unwanted = self.query.get("ifGenerationNotMatch")
        if unwanted is not None and int(unwanted) == generation:
            raise _Refused(304, "Not modified.")

    def _write(self, name: str, bucket: dict[str, tuple[bytes, int]], key: str):
        self._check(bucket, key)
        bucket[key] = (self.body, self.owner.next_generation())
        return 200, {"Content-Type": "application/json"}, self._metadata(name, bucket, key)

    def _read(self, name: str, bucket: dict[str, tuple[bytes, int]], key: str):
        if key not in bucket:
            raise _Refused(404, f"No such object: {name}/{key}")
        self._check(bucket, key)
        if self.query.get("alt") != "media":
            return 200, {"Content-Type": "application/json"}, self._metadata(name, bucket, key)
        content, generation = bucket[key]
        headers = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(generation),
            "x-goog-metageneration": "1",
            "x-goog-stored-content-length": str(len(content)),
            "x-goog-hash": f"md5={_md5(content)}",
        }
        wanted = self.headers.get("Range")
        if wanted is None:
            return 200, headers, content
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
        if match is None or not (match[1] or match[2]):
            raise _Refused(400, f"{wanted} is no range.")
        if match[1]:
            first, last = int(match[1]), int(match[2] or len(content) - 1)
        else:
            first, last = max(0, len(content) - int(match[2])), len(content) - 1
        last = min(last, len(content) - 1)
        if first > last:
            raise _Refused(416, "The requested range cannot be satisfied.")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, headers, content[first : last + 1]

    def _list(self, name: str, bucket: dict[str, tuple[bytes, int]]):
        prefix = self.query.get("prefix", "")
        start = self.query.get("startOffset", "")
        end = self.query.get("endOffset")
        keys = sorted(bucket, key=str.encode)
        keys = [
            key
            for key in keys
            if key.startswith(prefix) and key >= start and (not end or key < end)
        ]
        token = self.query.get("pageToken")
        if token:
            keys = keys[bisect.bisect_right(keys, base64.b64decode(token).decode()) :]
        size = min(int(self.query.get("maxResults") or LARGEST_PAGE), self.owner.page_size)
        page = {
            "kind": "storage#objects",
            "items": [json.loads(self._metadata(name, bucket, key)) for key in keys[:size]],
        }
        if len(keys) > size:
            page["nextPageToken"] = base64.b64encode(keys[size - 1].encode()).decode()
        return 200, {"Content-Type": "application/json"}, json.dumps(page).encode()

    def _metadata(self, name: str, bucket: dict[str, tuple[bytes, int]], key: str) -> bytes:
        content, generation = bucket[key]
        metadata: dict[str, Any] = {
            "kind": "storage#object",
            "bucket": name,
            "name": key,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "md5Hash": _md5(content),
            "storageClass": "STANDARD",
            "timeCreated": "2020-01-01T00:00:00.000Z",
            "updated": "2020-01-01T00:00:00.000Z",
        }
        return json.dumps(metadata).encode()

    def _reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304) and self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
