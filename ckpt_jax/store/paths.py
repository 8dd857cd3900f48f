"""Paths: which ones callers may pass, and which ones a file system and TensorStore can take.

Every public function that takes a path calls `as_path`, so that all of them accept and refuse the
same paths. It returns a path as it was given. A path may still be refused when it is used, because
that depends on where it leads:

require_addressable   TensorStore can name the files below it
require_room          its names and its length leave room for the files that a save writes there

A path may be the URL of an object store. `os.path.join`, `dirname` and `basename` do the same with
URLs as with paths. The functions that look at the working directory do not: `absolute`, `resolved`,
`relative` and `below` take their places.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any

from ckpt_jax.errors import CheckpointError
from ckpt_jax.store.objects import is_url
from ckpt_jax.store.presence import is_taken

_URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://", re.DOTALL)
# `pathlib` takes "gs://bucket" for "gs:/bucket".
_SHORTENED_URL = re.compile(
    r"(?P<scheme>file|gs|s3|gcs|az|abfss?|hdfs|https?|memory):/", re.IGNORECASE
)
# What a save needs below a checkpoint: staging, "/shards/00000-00000/d/", a name of TensorStore's.
_DEEPEST_NBYTES = 160


def as_path(path: Any, argument: str = "path", *, is_directory: bool = False) -> str:
    """A path that a caller gave, as a string.

    Args:
      path: a str, bytes or `os.PathLike`.
      argument: the name of the parameter, for errors.
      is_directory: whether it names a directory that holds checkpoints; then "" is the working
        directory.

    Raises:
      TypeError: it is something else.
      ValueError: it is a URL of something else than an object store, begins with a home directory
        ("~"), is empty, or has a null character.

    >>> as_path(b"runs/a"), as_path("a:b"), as_path("gs://bucket/a")
    ('runs/a', 'a:b', 'gs://bucket/a')
    >>> as_path("hdfs://host/a")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: path: expected a path in a file system, or a URL s3://, gs:// or memory://, got ...
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(
            f"{argument}: expected a path (str, bytes or os.PathLike), got "
            f"{_described(path, is_directory)}"
        )
    text = os.fsdecode(path)
    url = _URL.match(text)
    if url is None and isinstance(path, os.PathLike):
        url = _SHORTENED_URL.match(text)
    if url is not None and not is_url(text):
        raise ValueError(
            f"{argument}: expected a path in a file system, or a URL s3://, gs:// or memory://, "
            f"got the URL {text!r}. {_advice(url['scheme'], text[url.end() :])}"
        )
    if url is not None:
        _check_url(text, argument)
    if _begins_with_home(text):
        raise ValueError(
            f'{argument}: expected a path whose "~" is expanded, got {text!r}. Pass '
            f"os.path.expanduser({text!r}), or {'./' + text!r} for a directory of this name."
        )
    if not text and not is_directory:
        raise ValueError(
            f'{argument}: expected a path, got an empty string. Pass "." for the working directory.'
        )
    if "\0" in text:
        raise ValueError(
            f"{argument}: expected a path without a null character, got {text!r}. Remove the "
            "character."
        )
    return text


def _described(path: Any, is_directory: bool) -> str:
    if path is None and not is_directory:
        return (
            "None. latest_checkpoint returns None if there is no checkpoint yet: test for None "
            "first, and start from the beginning if it is."
        )
    found = repr(path) if path is None or isinstance(path, int | float) else _type_of(path)
    what = "directory of the checkpoints" if is_directory else "checkpoint"
    return f"{found}. Pass the path of the {what} here, and other arguments in their own places."


def _type_of(value: Any) -> str:
    kind = type(value)
    return f"an object of type {kind.__module__}.{kind.__qualname__}"


def _advice(scheme: str, rest: str) -> str:
    if scheme.lower() == "file":
        return f"Pass the path alone: {'/' + rest.lstrip('/')!r}."
    if scheme.lower() in ("s3", "gs", "memory"):
        whole = f"{scheme.lower()}://{rest.lstrip('/')}"
        return f"Pass {whole!r} as a string: pathlib drops a slash."
    return (
        f"Storages behind {scheme}:// are not supported. Mount the storage and pass the path of "
        "the mounted directory, or save to a local directory and copy the checkpoint."
    )


def _check_url(url: str, argument: str) -> None:
    scheme, _, rest = url.partition("://")
    bucket, *names = rest.split("/")
    if scheme != "memory" and not bucket:
        raise ValueError(f"{argument}: expected a path with a bucket, got {url!r}.")
    if any(each in (".", "..") for each in names) or "" in names[:-1]:
        raise ValueError(
            f"{argument}: expected a path without empty names, '.' and '..', which are names like "
            f"any other in an object store, got {url!r}."
        )


def _begins_with_home(text: str) -> bool:
    """Whether a shell would put a home directory at the beginning."""
    if not text.startswith("~"):
        return False
    # "~name" is an ordinary name, unless there is a user of that name.
    return text.partition("/")[0] == "~" or os.path.expanduser(text) != text


def absolute(path: str) -> str:
    """The path from the root, so that it stays the same if the program goes elsewhere.

    Raises:
      FileNotFoundError: the path is relative, and the working directory was removed.
    """
    if is_url(path):
        return path if path.endswith("://") else path.rstrip("/")
    try:
        return os.path.abspath(path)
    except FileNotFoundError as error:
        raise _nowhere(path) from error


def resolved(path: str) -> str:
    """The path from the root without symbolic links, so that it stays if a link is moved on.

    Raises:
      FileNotFoundError: the path is relative, and the working directory was removed.
    """
    if is_url(path):
        return absolute(path)
    try:
        return os.path.realpath(path)
    except FileNotFoundError as error:
        raise _nowhere(path) from error


def relative(path: str, directory: str) -> str:
    """The way from a directory to a path below it, with "/" between names.

    >>> relative("/a/b/c/d", "/a/b"), relative("s3://a/b/c", "s3://a")
    ('c/d', 'b/c')
    """
    if is_url(path):
        return absolute(path).removeprefix(f"{absolute(directory)}/")
    return os.path.relpath(path, directory).replace(os.sep, "/")


def below(directory: str, names: str) -> str:
    """The path to which a way leads from a directory; the inverse of `relative`."""
    if is_url(directory):
        return f"{absolute(directory)}/{names}"
    return os.path.normpath(os.path.join(directory, names))


def is_within(path: str, directory: str) -> bool:
    """Whether a path lies below a directory."""
    return absolute(path).startswith(os.path.join(absolute(directory), ""))


def _nowhere(path: str) -> FileNotFoundError:
    return FileNotFoundError(
        errno.ENOENT,
        "expected an existing working directory for a relative path, but it was removed. Change "
        "to another directory, or pass an absolute path",
        path,
    )


def require_addressable(path: str) -> None:
    """Checks that TensorStore can name the files below an absolute path.

    Raises:
      CheckpointError: it cannot.
    """
    if is_url(path):
        return
    if "\\" in path and os.sep == "/":
        raise CheckpointError(
            f"{path}: expected a path without a backslash, which TensorStore takes for a separator "
            "of directories. Use a path without one."
        )
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{os.fsencode(path)!r}: expected a path in UTF-8, which is all that TensorStore "
            "takes, got other bytes. Use only names in UTF-8."
        ) from None


def require_room(path: str, suffix: str = "") -> None:
    """Checks that an absolute path is short enough for a save, before anything is created.

    Args:
      path: of a checkpoint.
      suffix: the end of its staging directory's name, after the name of the checkpoint.

    Raises:
      OSError: a name, or the path, is longer than the file system allows (ENAMETOOLONG).
    """
    above, names = path, []
    while not _is_there(above) and above != os.path.dirname(above):
        above, name = os.path.split(above)
        names.append(name)
    if not names:
        above, name = os.path.split(path)
        names.append(name)
    name_limit, path_limit = _limits(above)
    for number, name in enumerate(names):
        needed = "" if number else suffix  # the first is the checkpoint's own
        if (length := len(os.fsencode(name + needed))) > name_limit:
            room = f", of which a save needs {len(needed)} for its staging" if needed else ""
            raise OSError(
                errno.ENAMETOOLONG,
                f"expected names of at most {name_limit} bytes{room}, got one of "
                f"{length - len(needed)}. Nothing was changed. Use a shorter name",
                path,
            )
    most = path_limit - _DEEPEST_NBYTES
    if (length := len(os.fsencode(path + suffix))) > most:
        raise OSError(
            errno.ENAMETOOLONG,
            f"expected a path of at most {most - len(suffix)} bytes, got {length - len(suffix)}. "
            "Nothing was changed. Use a shorter path",
            path,
        )


def _is_there(path: str) -> bool:
    try:
        return is_taken(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _limits(directory: str) -> tuple[int, int]:
    """The longest name and the longest path in a directory, in bytes."""
    try:
        limits = [os.pathconf(directory, name) for name in ("PC_NAME_MAX", "PC_PATH_MAX")]
    except (OSError, ValueError):  # then the system itself refuses paths that are too long
        limits = [-1, -1]
    name, path = (limit if limit > 0 else 1 << 30 for limit in limits)
    return name, path
