"""The parts of a checkpoint, as bytes: read, and replaced with the digests made anew."""

import hashlib
from pathlib import Path

from ckpt_jax.graph._proto import index_pb2, manifest_pb2
from ckpt_jax.store.manifest import INDEX_KEY, MANIFEST, META
from ckpt_jax.store.seal import seal, unseal


def manifest(path):
    """The manifest of a checkpoint, as a message."""
    return manifest_pb2.Manifest.FromString(unseal(Path(path, MANIFEST).read_bytes()))


def write_manifest(path, message):
    Path(path, MANIFEST).write_bytes(seal(message.SerializeToString(deterministic=True)))


def file_of(path, name):
    """The file of a part."""
    (found,) = [each for each in manifest(path).parts if each.name == name]
    return Path(path, META, found.file)


def part(path, name):
    return file_of(path, name).read_bytes()


def replace_part(path, name, data):
    file_of(path, name).write_bytes(data)
    message = manifest(path)
    for each in message.parts:
        if each.name == name:
            each.nbytes, each.digest = len(data), hashlib.sha256(data).digest()
    write_manifest(path, message)


def index(path):
    """The index of a checkpoint, as a message."""
    return index_pb2.Index.FromString(unseal(part(path, INDEX_KEY)))


def replace_index(path, message):
    replace_part(path, INDEX_KEY, seal(message.SerializeToString(deterministic=True)))


def shard_index(directory):
    """The index that a shard has of its own, as a message."""
    return index_pb2.Index.FromString(unseal(Path(directory, "index").read_bytes()))


def replace_shard_index(directory, message):
    """Replaces the index of a shard that is in no checkpoint."""
    Path(directory, "index").write_bytes(seal(message.SerializeToString(deterministic=True)))


def replace_index_of_shard(path, number, data):
    """Replaces the own index of a shard of a checkpoint."""
    message = index(path)
    Path(path, message.shards[number].directory, "index").write_bytes(data)
    message.shards[number].digest = hashlib.sha256(data).digest()
    replace_index(path, message)


def data_files(path):
    """The files with the bytes of arrays, of a checkpoint or of a shard."""
    found = [*Path(path).glob("shards/*/c/*"), *Path(path).glob("c/*")]
    return sorted(file for file in found if file.is_file())
