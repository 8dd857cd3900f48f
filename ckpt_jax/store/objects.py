"""Object stores: values by key, behind the URLs s3://, gs:// and memory://.

A store has no directories, and nothing in it can be renamed or locked. It has one thing that a file
system has not: a value can be written on the condition that the present one has a known
*generation*, or that there is none. All that is built on stores needs no more than that.

Every function takes URLs. TensorStore does the I/O, and tries again what fails in passing. An error
that stays is an OSError of its kind, within a time that is bounded (`use_storage`). It is never
taken for absence or for damage.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

import tensorstore as ts

from ckpt_jax.store.forks import use_tensorstore

ABSENT = b"\x02"  # the generation of what is not there
PARALLEL = 32  # requests at once: a store answers many together as soon as one
_URL = re.compile(r"(?P<scheme>s3|gs|memory)://(?P<rest>.*)", re.DOTALL)
_DRIVERS = {"s3": "s3", "gs": "gcs"}
_RETRIES = 6  # with the waits between them, about half a minute
_WAITS = {"initial_delay": "500ms", "max_delay": "8s"}  # between two tries
_REQUEST_SECONDS = 60.0
_IN_PASSING = ("ABORTED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED")
_REGION = "us-east-1"  # of stores that are not Amazon's, and that do not care


class NoSuchBucketError(FileNotFoundError):
    """There is no such bucket. It is not known what else is missing."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a store is reached; None means that the environment, or a default, says it.

    Attributes:
      endpoint: the URL of its server.
      region: its name there.
      retries: how often a request that fails in passing is tried again.
      request_timeout_seconds: after which a request, with all retries, has failed.
    """

    endpoint: str | None = None
    region: str | None = None
    retries: int | None = None
    request_timeout_seconds: float | None = None

    def over(self, others: Settings) -> Settings:
        """These settings, and others where nothing is set."""
        unset = {f.name: getattr(others, f.name) for f in fields(self) if self._lacks(f.name)}
        return replace(self, **unset)

    def _lacks(self, name: str) -> bool:
        return getattr(self, name) is None


_log = logging.getLogger("ckpt_jax")
_settings: dict[str, Settings] = {}  # by URL, without a "/" at the end
_lock = threading.Lock()


@dataclass(eq=False)
class _Bucket:
    """A bucket as this process reaches it, and what is known of it."""

    store: ts.KvStore
    url: str
    seconds: float
    is_there: bool = False  # or it does not tell
    readable: set[str] = field(default_factory=set)  # directories in which something was read
    has_warned: bool = False  # that nothing is listed


_buckets: dict[tuple[str, Settings, tuple[str | None, ...]], _Bucket] = {}
_contexts: dict[tuple[str | None, ...], ts.Context] = {}
# TensorStore reads them once for each context.
_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "TENSORSTORE_GCS_HTTP_URL",
)


def is_url(path: str) -> bool:
    """Whether a path lies in an object store.

    >>> is_url("s3://bucket/run"), is_url("/runs/s3")
    (True, False)
    """
    return path.startswith(("s3://", "gs://", "memory://"))


def has_key(url: str) -> bool:
    """Whether a URL is that of a value, or of what lies below a name, and not of a whole bucket.

    >>> has_key("gs://bucket/run"), has_key("gs://bucket")
    (True, False)
    """
    return _parted(url)[1] != ""


def use_storage(
    prefix: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    region: str | None = None,
    retries: int | None = None,
    request_timeout_seconds: float | None = None,
) -> None:
    """Sets how the object store below a URL is reached, for this process.

    What is not given comes from the environment: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`,
    `AWS_REGION` or `AWS_DEFAULT_REGION`. Credentials always come from there, or from the usual
    files and services.

    Args:
      prefix: a URL, such as "s3://bucket" or "s3://bucket/runs". The longest that fits a path
        counts. A second call for the same URL replaces the first.
      endpoint: the URL of the server, for stores other than Amazon's ("https://...").
      region: the name of the region.
      retries: how often a request that fails in passing is tried again; 6 by default.
      request_timeout_seconds: after which a request, with all retries, has failed; 60 by default.

    Raises:
      ValueError: the prefix is no URL of an object store, the endpoint is no URL or given for a
        store that takes none, or a number is negative.

    Example:
      >>> use_storage("memory://runs", retries=2, request_timeout_seconds=10)
    """
    url = os.fspath(prefix)
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"prefix: expected a URL s3://, gs:// or memory://, got {url!r}.")
    if endpoint is not None and match["scheme"] != "s3":
        raise ValueError(
            f"{url}: expected no endpoint, because only s3:// has one, got {endpoint!r}. For gs:// "
            "set the environment variable TENSORSTORE_GCS_HTTP_URL."
        )
    if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
        raise ValueError(f'endpoint: expected a URL "https://...", got {endpoint!r}.')
    if retries is not None and retries < 0:
        raise ValueError(f"retries: expected 0 or more, got {retries}.")
    if request_timeout_seconds is not None and not request_timeout_seconds > 0:
        raise ValueError(
            f"request_timeout_seconds: expected more than 0, got {request_timeout_seconds}."
        )
    with _lock:
        _settings[url.rstrip("/")] = Settings(endpoint, region, retries, request_timeout_seconds)


def settings_of(url: str) -> Settings:
    """The settings for a URL, with those of the environment and the defaults."""
    with _lock:
        fitting = [each for each in _settings if url == each or url.startswith(f"{each}/")]
        own = _settings[max(fitting, key=len)] if fitting else Settings()
    env = os.environ.get
    surrounding = Settings(
        env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or None,
        env("AWS_REGION") or env("AWS_DEFAULT_REGION") or None,
    )
    return own.over(surrounding).over(Settings(None, None, _RETRIES, _REQUEST_SECONDS))


@dataclass(frozen=True, slots=True)
class Found:
    """A value, or a part of it, and its generation."""

    value: bytes
    generation: bytes


def read(
    url: str, start: int = 0, stop: int | None = None, *, is_named: bool = False
) -> Found | None:
    """The bytes from `start` to `stop` of the value at a URL; None if there is no value.

    Args:
      url: of the value.
      start, stop: the part to read; `start` counts from the end if it is negative.
      is_named: whether a checkpoint names the value. If the store refuses to show it, this is then
        an error. Otherwise the value may be absent (`_may_read_beside`).

    Raises:
      EOFError: the value ends before.
      OSError: it is not known whether there is one.
    """
    return reading(url, start, stop, is_named=is_named)()


def reading(
    url: str, start: int = 0, stop: int | None = None, *, is_named: bool = False
) -> Callable[[], Found | None]:
    """Begins to read, and returns what waits for the outcome; see `read`."""
    bucket, key = _place(url)
    part = None if start == 0 and stop is None else slice(start, stop)
    future = bucket.store.read(key, byte_range=part)

    def outcome() -> Found | None:
        try:
            found = future.result(timeout=bucket.seconds)
        except Exception as error:
            if "OUT_OF_RANGE" in str(error):
                raise EOFError(url) from error
            trouble = trouble_of(error, url)
            is_denied = not is_named and _may_mean_absence(trouble)
            if is_denied and _may_read_beside(bucket, url):
                return None
            _fail(error, url)
        if found.state != "value":
            _require_bucket(bucket, url, key)
            return None
        bucket.is_there = True
        bucket.readable.add(os.path.dirname(url))
        return Found(found.value, found.stamp.generation)

    return outcome


def _require_bucket(bucket: _Bucket, url: str, key: str) -> None:
    """Makes sure, once for each bucket, that a value is missing and not the bucket: reads answer
    both alike. Google's stores do not tell either."""
    if bucket.is_there or bucket.url == "memory://":
        return
    try:
        only = ts.KvStore.KeyRange(key, f"{key}\0")
        bucket.store.list(only).result(timeout=bucket.seconds)
    except Exception as error:
        with suppress(PermissionError):  # who may not list may write and read all the same
            _fail(error, url)
    bucket.is_there = True


def _may_mean_absence(trouble: OSError | None) -> bool:
    """Whether an error may say that nothing is there: stores do not tell that to those who may not
    list. Wrong credentials are another matter."""
    wrong = "InvalidAccessKeyId", "SignatureDoesNotMatch", "Token", "RequestTimeTooSkewed"
    said = str(trouble)
    return isinstance(trouble, PermissionError) and not any(each in said for each in wrong)


def _may_read_beside(bucket: _Bucket, url: str) -> bool:
    """Whether this process may read in the directory of a value that a store refuses to show.

    If so, the value is not there. If nothing has been read there yet, a probe is written and read.
    """
    directory = os.path.dirname(url)
    if not any(directory == each or directory.startswith(f"{each}/") for each in bucket.readable):
        probe = f"{directory}/.probe-{secrets.token_hex(8)}"
        key = _parted(probe)[1]
        try:
            write(probe, b"", ABSENT)
            found = bucket.store.read(key).result(timeout=bucket.seconds)
        except Exception:  # the caller has an error that says more
            return False
        with suppress(OSError):
            delete(probe)
        if found.state != "value":
            return False
        bucket.readable.add(directory)
    return True


def generation_of(url: str) -> bytes | None:
    """The generation of the value at a URL; None if there is none; raises like `read`."""
    found = read(url)
    return None if found is None else found.generation


def generations_of(urls: Iterable[str]) -> list[bytes | None]:
    """The generations of several values, which are asked for at once, and are not read."""
    asked = [reading(url, 0, 0) for url in urls]
    found = [outcome() for outcome in asked]
    return [None if each is None else each.generation for each in found]


def write(url: str, value: bytes, if_generation: bytes | None = None) -> bytes | None:
    """Writes a value. It is durable when this returns.

    Args:
      url: of the value.
      value: all of it.
      if_generation: what the present value must have; `ABSENT` if there must be none.

    Returns:
      Its generation; None if the present value is not the expected one, and stays. It may be this
      very value, if a reply was lost.

    Raises:
      OSError: it is not known whether it was written, unless the error says so.
    """
    bucket, key = _place(url)
    try:
        writing = bucket.store.write(key, value, if_equal=if_generation)
        stamp = writing.result(timeout=bucket.seconds)
    except Exception as error:
        _fail(error, url)
    if stamp.generation:
        bucket.is_there = True
    return stamp.generation or None


def delete(url: str, if_generation: bytes | None = None) -> bool:
    """Removes the value at a URL. It is no error if there is none. Returns whether it is gone, and
    raises like `write`."""
    bucket, key = _place(url)
    try:
        writing = bucket.store.write(key, None, if_equal=if_generation)
        stamp = writing.result(timeout=bucket.seconds)
    except Exception as error:
        _fail(error, url)
    return bool(stamp.generation)


def keys_below(url: str) -> list[str]:
    """The keys of all values below a URL, relative to it, sorted.

    If this program may read and write there, but not list, none are found, and a warning says so.

    Raises:
      NoSuchBucketError: there is no such bucket.
      OSError: the store did not tell.
    """
    bucket, key = _place(url)
    prefix = f"{key}/" if key else ""
    try:
        listing = bucket.store.list(_below(key), len(prefix.encode()))
        found = listing.result(timeout=bucket.seconds)
    except Exception as error:
        is_denied = _may_mean_absence(trouble_of(error, url))
        if not (is_denied and _may_read_beside(bucket, f"{url}/any")):
            _fail(error, url)
        if not bucket.has_warned:
            bucket.has_warned = True
            _log.warning(
                "%s: the store does not let this program list what is there. Checkpoints are found "
                "only through the state file, and nothing that interrupted saves have left is "
                "removed. To change that, allow to list.",
                url,
            )
        return []
    return sorted(name.decode("utf-8", "surrogateescape") for name in found)


def opened_below(url: str) -> tuple[dict[str, Any], ts.Context]:
    """TensorStore's description of the values below a URL, and the context to open it in."""
    root, key = _parted(url)
    settings = settings_of(url)
    spec = _spec(root, settings)
    return {**spec, "path": f"{key}/" if key else ""}, _context()


def _spec(root: str, settings: Settings) -> dict[str, Any]:
    scheme, _, bucket = root.partition("://")
    if scheme == "memory":
        return {"driver": "memory"}
    driver = _DRIVERS[scheme]
    retries = {"max_retries": settings.retries, **_WAITS}
    spec: dict[str, Any] = {
        "driver": driver,
        "bucket": bucket,
        f"{driver}_request_retries": retries,
        f"{driver}_request_concurrency": {"limit": 2 * PARALLEL},
    }
    if scheme == "s3":
        # Without it, a store that is not Amazon's is asked first, and then written to all the same.
        spec["use_conditional_write"] = True
        if settings.endpoint is not None:
            spec["endpoint"] = settings.endpoint
        if (region := settings.region or (settings.endpoint and _REGION)) is not None:
            spec["aws_region"] = region  # otherwise the store is asked for it
        if "AWS_ACCESS_KEY_ID" in os.environ:  # otherwise it is looked for in several places
            spec["aws_credentials"] = {"type": "environment"}
    return spec


# In its children memory:// is one place.
_SHARED = ts.Context({"memory_key_value_store": {}, "cache_pool": {"total_bytes_limit": 0}})


def _context() -> ts.Context:
    use_tensorstore()
    surroundings = _surroundings()
    with _lock:
        return _contexts.setdefault(surroundings, ts.Context({}, _SHARED))


def _surroundings() -> tuple[str | None, ...]:
    return tuple([os.environ.get(name) for name in _ENVIRONMENT])


def _parted(url: str) -> tuple[str, str]:
    """The URL of a bucket, and the key in it. All of memory:// is one bucket."""
    match = _URL.fullmatch(url)
    assert match is not None, url
    if match["scheme"] == "memory":
        return "memory://", match["rest"]
    bucket, _, key = match["rest"].partition("/")
    return f"{match['scheme']}://{bucket}", key


def _place(url: str) -> tuple[_Bucket, str]:
    """The bucket of a URL, and the key in it."""
    root, key = _parted(url)
    settings = settings_of(url)
    context = _context()
    known = root, settings, _surroundings()
    with _lock:
        bucket = _buckets.get(known)
    if bucket is None:
        seconds = settings.request_timeout_seconds or _REQUEST_SECONDS
        try:
            opening = ts.KvStore.open({**_spec(root, settings), "path": ""}, context=context)
            store = opening.result(timeout=seconds)
        except Exception as error:
            _fail(error, url)
        with _lock:
            bucket = _buckets.setdefault(known, _Bucket(store, root, seconds))
    return bucket, key


def _below(key: str) -> ts.KvStore.KeyRange:
    # "0" follows "/".
    return ts.KvStore.KeyRange(f"{key}/", f"{key}0") if key else ts.KvStore.KeyRange()


def _fail(error: Exception, url: str) -> NoReturn:
    if (trouble := trouble_of(error, url)) is not None:
        raise trouble from error
    said = " ".join(str(error).split())[:500]
    raise OSError(errno.EIO, f"the store failed: {said}", url) from error


def trouble_of(error: Exception, url: str) -> OSError | None:
    """The OSError for an error of TensorStore that is about the store and not about a value; None
    if it may be about a value."""
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return error
    said = " ".join(str(error).split())[:500]
    bucket = url.split("/")[2]
    if isinstance(error, TimeoutError):
        seconds = settings_of(url).request_timeout_seconds
        return TimeoutError(
            errno.ETIMEDOUT,
            f"the store has not answered within {seconds:g} s. Try again later, or give it more "
            "time with ckpt.use_storage(request_timeout_seconds=...)",
            url,
        )
    if "NoSuchBucket" in said or "bucket does not exist" in said:
        return NoSuchBucketError(
            errno.ENOENT,
            f"there is no such bucket: {bucket!r}. Create it, or correct the name, the region or "
            "the endpoint",
            url,
        )
    if said.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")) or "='403'" in said:
        return PermissionError(
            errno.EACCES, f"the store refuses this request: {said}. Check the credentials", url
        )
    if said.startswith(_IN_PASSING) or "CURL error" in said or "http_response_code" in said:
        return OSError(errno.EIO, f"the store failed; try again later: {said}", url)
    return None
