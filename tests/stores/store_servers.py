"""Object stores on this machine, for tests: SeaweedFS and moto, each a process of its own.

Nothing here listens on, or talks to, anything but 127.0.0.1.
"""

from __future__ import annotations

import functools
import http.client
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from typing import Any

REGION = "us-east-1"
READY_SECONDS = 120

# Names and secrets of the identities that SeaweedFS knows.
KEY, SECRET = "tests", "a-secret-of-the-tests"
READER_KEY, READER_SECRET = "reader", "a-secret-of-the-reader"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; SeaweedFS also takes each of them plus 10000, for gRPC."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as plain, socket.socket() as grpc:
            plain.bind(("127.0.0.1", 0))
            port = plain.getsockname()[1]
            if port + 10000 > 65535:
                continue
            try:
                grpc.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            if port not in found:
                found.append(port)
    return found


def program(name: str) -> str | None:
    """Where a program is that pip installed beside this Python, or elsewhere on the path."""
    beside = pathlib.Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _dies_with_its_parent() -> list[str]:
    """What makes a process end even if the tests are killed; Linux has it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


class S3Server:
    """A process that serves S3 at `url`. Subclasses say how it is started."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Starts the process, with the ports and the data that it had before, if any."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                [*_dies_with_its_parent(), *self.command()],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, (
                f"{self.process.args} did not get ready: {(self.directory / 'log').read_text()}"
            )
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether requests are served: a refusal is an answer, too."""
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except OSError:
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """Ends the process at once, as a crash does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    @functools.cached_property
    def client(self) -> Any:
        """Another implementation of S3, to make buckets and to look from outside."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(s3={"addressing_style": "path"}, proxies={}),
        )

    def buckets(self) -> list[str]:
        return [bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]]

    def make_bucket(self, name: str) -> None:
        self.client.create_bucket(Bucket=name)


class Moto(S3Server):
    """moto: ready in a second, checks conditions, but neither signatures nor permissions."""

    def command(self) -> list[str]:
        (port,) = free_ports(1) if not self.url else [int(self.url.rsplit(":", 1)[1])]
        self.url = f"http://127.0.0.1:{port}"
        return [str(program("moto_server")), "-H", "127.0.0.1", "-p", str(port)]


class Seaweed(S3Server):
    """SeaweedFS: checks conditions, signatures and permissions; data survive a kill."""

    _probed = False

    def answers(self) -> bool:
        """Whether objects are stored, too; after a restart, also whether old ones are read."""
        from botocore.exceptions import BotoCoreError, ClientError

        if not super().answers():
            return False
        probe = {"Bucket": "probe-of-tests", "Key": "probe"}
        try:
            if self._probed:
                self.client.get_object(**probe)
            elif probe["Bucket"] not in self.buckets():
                self.client.create_bucket(Bucket=probe["Bucket"])
            self.client.put_object(**probe, Body=b"probe")
        except (BotoCoreError, ClientError):
            return False
        self._probed = True
        return True

    def command(self) -> list[str]:
        configuration = self.directory / "s3.json"
        if not self.url:
            self.ports = free_ports(4)
            self.url = f"http://127.0.0.1:{self.ports[3]}"
            (self.directory / "data").mkdir()
            configuration.write_text(
                json.dumps(
                    {
                        "identities": [
                            {
                                "name": "tests",
                                "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                            },
                            {
                                "name": "reader",
                                "credentials": [
                                    {"accessKey": READER_KEY, "secretKey": READER_SECRET}
                                ],
                                "actions": ["Read", "List"],
                            },
                        ]
                    }
                )
            )
        master, volume, filer, s3 = self.ports
        return [
            str(program("weed")),
            "server",
            f"-dir={self.directory / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",  # it is on by default, and would leave this machine
            f"-master.port={master}",
            "-master.volumeSizeLimitMB=64",
            f"-volume.port={volume}",
            "-volume.max=0",  # as many as the disk holds: each bucket takes several
            "-filer",
            f"-filer.port={filer}",
            f"-filer.localSocket={self.directory / 'filer.sock'}",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.config={configuration}",
            f"-s3.localSocket={self.directory / 's3.sock'}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
