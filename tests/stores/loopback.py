"""HTTP servers on this machine that run on threads of the tests."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackServer(ThreadingHTTPServer):
    """Serves requests from when it is made until `end` is called.

    Its handlers are of the class `handler`, and find `owner` in the attribute of that name.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, handler: type[BaseHTTPRequestHandler], owner: Any):
        bound = type(handler.__name__, (handler,), {"owner": owner})
        super().__init__(("127.0.0.1", 0), bound)
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that went away is no news."""

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
