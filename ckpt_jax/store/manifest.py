"""The manifest: the file that makes a directory a checkpoint, and the messages that it names.

A *part* is a sealed message, or other small value, in a file of its own: the index, the object
graph. The manifest lists the parts with their sizes and digests. It is written last, in one step.
So a directory without a manifest is not a checkpoint yet, and one with a manifest is a complete
one. No part is ever changed.

In an object store, several attempts to save a checkpoint may write below its URL at the same time.
So the names of their parts, and of their shards, bear the *mark* of the attempt. The manifest names
those of the attempt that has won.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ckpt_jax.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedFormatError,
)
from ckpt_jax.graph._proto import manifest_pb2
from ckpt_jax.store import objects
from ckpt_jax.store.durable import fsync_directory, naming
from ckpt_jax.store.index import DIGEST_NBYTES, FORMAT_VERSION, check_version
from ckpt_jax.store.objects import ABSENT, NoSuchBucketError, is_url
from ckpt_jax.store.seal import seal, unseal
from ckpt_jax.store.workers import Workers

MANIFEST = "manifest.ckpt"  # the file whose presence makes a directory a checkpoint
INDEX_KEY = "_INDEX"  # the name of the part that is the index
INDEX = "index"  # the file of the index, of a checkpoint and of a shard
META = "meta"  # the directory of the parts

_MAX_MANIFEST_NBYTES = 1 << 20
_MAX_PART_NBYTES = 1 << 30
_FILE = re.compile(r"[a-z0-9_-]+")
_NOT_REGULAR = "this is not a regular file"


@dataclass(frozen=True, slots=True)
class Part:
    """A message in a file of its own; see `manifest.proto`."""

    file: str
    nbytes: int
    digest: bytes


def write_parts(
    directory: str, values: Mapping[str, bytes], *, durable: bool, mark: str = ""
) -> dict[str, Part]:
    """Writes values into files of their own below `directory`, which has no manifest yet.

    Files that an interrupted merge has left there are replaced.

    Args:
      directory: of a checkpoint that is not there yet.
      values: by name.
      durable: whether they have to survive a power failure.
      mark: of the attempt, in an object store.

    Returns:
      The parts by name.
    """
    parts: dict[str, Part] = {}
    meta = os.path.join(directory, META)
    for name, value in values.items():
        file = _file_name(name, {part.file for part in parts.values()}, mark)
        parts[name] = Part(file, len(value), hashlib.sha256(value).digest())
    if is_url(directory):
        with Workers(min(len(parts), 8), "ckpt-parts") as workers:
            paths = [os.path.join(meta, part.file) for part in parts.values()]
            for _ in workers.map(objects.write, paths, values.values()):
                pass
        return parts
    os.makedirs(meta, exist_ok=True)
    for name, value in values.items():
        path = os.path.join(meta, parts[name].file)
        with suppress(FileNotFoundError):
            os.unlink(path)
        write_file(path, value, durable=durable)
    if durable:
        fsync_directory(meta)
    return parts


def manifest_of(parts: Mapping[str, Part]) -> bytes:
    """The contents of the manifest that names these parts."""
    message = manifest_pb2.Manifest(format_version=FORMAT_VERSION)
    for name, part in sorted(parts.items()):
        message.parts.add(name=name, file=part.file, nbytes=part.nbytes, digest=part.digest)
    return seal(message.SerializeToString(deterministic=True))


def write_manifest(directory: str, parts: Mapping[str, Part], *, durable: bool) -> None:
    """Makes a directory of a file system a checkpoint, in one step."""
    data = manifest_of(parts)
    path = os.path.join(directory, MANIFEST)
    new = f"{path}.new"
    with suppress(FileNotFoundError):
        os.unlink(new)
    write_file(new, data, durable=durable)
    os.rename(new, path)
    if durable:
        fsync_directory(directory)


def write_file(path: str, data: bytes, *, durable: bool) -> None:
    """Writes a new file.

    Raises:
      FileExistsError: there is something at `path`.
    """
    if is_url(path):
        if objects.write(path, data, ABSENT) is None:
            found = objects.read(path)
            if found is None or found.value != data:  # else it is ours, and the reply was lost
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        return
    with naming(path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def _file_name(name: str, taken: set[str], mark: str) -> str:
    end = f"-{mark}" if mark else ""
    if name == INDEX_KEY:
        return INDEX + end
    plain = "-".join(_FILE.findall(name.lower().strip("_"))) or "part"
    number = 1
    file = plain + end
    while file in taken or file == INDEX + end:
        number += 1
        file = f"{plain}-{number}{end}"
    return file


def read_manifest(directory: str) -> dict[str, Part]:
    """The parts of the checkpoint in `directory`, by name.

    Raises:
      CheckpointNotFoundError: there is no manifest.
      CorruptCheckpointError: the manifest is damaged.
      UnsupportedFormatError: another version of this library wrote it.
    """
    path = os.path.join(directory, MANIFEST)
    try:
        data = read_file(path, _MAX_MANIFEST_NBYTES)
    except NoSuchBucketError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFoundError(
            f"{directory}: this is no checkpoint, {MANIFEST} is missing"
        ) from None
    try:
        return parts_in(data)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{path}: {error}", file=path) from error
    except UnsupportedFormatError as error:
        raise UnsupportedFormatError(f"{path}: {error}") from error


def parts_in(data: bytes) -> dict[str, Part]:
    """The parts that a manifest names, by name; the inverse of `manifest_of`.

    Raises:
      CorruptCheckpointError: the manifest is damaged.
      UnsupportedFormatError: another version of this library wrote it.
    """
    try:
        message = manifest_pb2.Manifest.FromString(unseal(data))
    except DecodeError as error:
        raise CorruptCheckpointError(str(error)) from error
    check_version(message.format_version, "manifest")
    parts = {m.name: Part(m.file, m.nbytes, m.digest) for m in message.parts}
    if len(parts) < len(message.parts):
        raise CorruptCheckpointError("manifest is inconsistent: two parts have one name")
    for name, part in parts.items():
        if not _FILE.fullmatch(part.file) or len(part.digest) != DIGEST_NBYTES:
            raise CorruptCheckpointError(f"manifest is inconsistent: part {name[:80]!r}")
    return parts


def read_part(directory: str, part: Part) -> bytes:
    """The contents of a part.

    Raises:
      CorruptCheckpointError: they are not the ones that were committed.
    """
    return read_digested(part_path(directory, part), part.digest, part.nbytes)


def part_path(directory: str, part: Part) -> str:
    """The path of the file of a part of the checkpoint in `directory`."""
    return os.path.join(directory, META, part.file)


def read_digested(path: str, digest: bytes, nbytes: int | None = None) -> bytes:
    """The contents of a file whose digest, and perhaps size, are known.

    Raises:
      CorruptCheckpointError: they are not the ones that were committed.
    """
    try:
        data = read_file(path, _MAX_PART_NBYTES, is_named=True)
    except NoSuchBucketError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpointError(f"{path}: the file is missing", file=path) from error
    if nbytes is not None and len(data) != nbytes:
        what = f"{path}: the file has {len(data)} bytes, expected {nbytes}"
        raise CorruptCheckpointError(what, file=path)
    if hashlib.sha256(data).digest() != digest:
        what = f"{path}: these are not the bytes of this checkpoint: the digest does not match"
        raise CorruptCheckpointError(what, file=path)
    return data


def read_file(path: str, max_nbytes: int = _MAX_PART_NBYTES, *, is_named: bool = False) -> bytes:
    """The contents of a regular file of bounded size.

    Args:
      path: of the file.
      max_nbytes: how many bytes it may have.
      is_named: whether a checkpoint names it; see `objects.read`.

    Raises:
      CorruptCheckpointError: it is no regular file, or is too large.
      FileNotFoundError: there is none.
      OSError: it cannot be read.
    """
    if is_url(path):
        found = objects.read(path, is_named=is_named)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found.value
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.ELOOP):
            raise CorruptCheckpointError(f"{path}: {_NOT_REGULAR}", file=path) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CorruptCheckpointError(f"{path}: {_NOT_REGULAR}", file=path)
    with naming(path), open(descriptor, "rb") as file:
        if status.st_size > max_nbytes:
            what = f"{path}: the file has {status.st_size} bytes, at most {max_nbytes} are expected"
            raise CorruptCheckpointError(what, file=path)
        return file.read(status.st_size)
