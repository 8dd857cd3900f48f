"""A disk that loses power: what is on it after each call of a record, and after the power is back.

A file holds the bytes of its last fsync, and a directory the names of its last fsync. Of what was
done to it since, any beginning may have reached the disk, of each file and each directory on its
own: `lost` is the case that nothing has, `chance` decides otherwise.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class File:
    durable: bytes = b""
    pending: list[Callable[[bytearray], None]] = field(default_factory=list)

    def do(self, change):
        self.pending.append(change)

    def after(self, steps):
        data = bytearray(self.durable)
        for change in self.pending[:steps]:
            change(data)
        return bytes(data)

    def flush(self):
        self.durable, self.pending = self.after(len(self.pending)), []


@dataclass
class Directory:
    durable: dict[str, "File | Directory"] = field(default_factory=dict)
    pending: list[Callable[[dict], None]] = field(default_factory=list)

    def do(self, change):
        self.pending.append(change)

    def after(self, steps):
        names = dict(self.durable)
        for change in self.pending[:steps]:
            change(names)
        return names

    def flush(self):
        self.durable, self.pending = self.after(len(self.pending)), []

    @property
    def names(self):
        return self.after(len(self.pending))


def loaded(path: Path) -> Directory:
    """What is in a directory, all of it durable."""
    return Directory(
        {
            child.name: loaded(child) if child.is_dir() else File(child.read_bytes())
            for child in path.iterdir()
        }
    )


def stored(disk: Directory, path: Path, steps: Callable[[int], int]) -> None:
    """Makes the directory as it is when the power is back.

    Args:
      steps: of how many pending changes so many have reached the disk.
    """
    path.mkdir()
    for name, child in disk.after(steps(len(disk.pending))).items():
        if isinstance(child, Directory):
            stored(child, path / name, steps)
        else:
            (path / name).write_bytes(child.after(steps(len(child.pending))))


def nothing(pending: int) -> int:
    return 0


def any_beginning(chance: random.Random) -> Callable[[int], int]:
    # All, nothing, or a part; a part is the rarer the less is pending.
    return lambda pending: chance.choice((0, pending, chance.randint(0, pending)))


def states(start: Directory, directory: Path, record: Path) -> Iterator[tuple[str, str]]:
    """Does to `start` what the record says, call by call.

    Yields:
      After each call, what it was: its kind and its first argument. `start` is then as that
      call left it.
    """
    data = record.read_bytes()
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        kind, first, *rest = data[at:end].decode().split("\t")
        at = end + 1
        written = b""
        if kind == "write":
            size = int(rest[1])
            written = data[at : at + size]
            at += size
        if kind != "mark":
            places = [first, *rest] if kind in ("rename", "exchange") else [first]
            parts = [Path(place).relative_to(directory).parts for place in places]
            _apply(start, kind, parts, rest, written)
        yield kind, first


def _apply(root, kind, parts, rest, written):
    if kind == "fsync":
        _find(root, parts[0]).flush()
    elif kind == "write":
        offset = int(rest[0])

        def write(contents: bytearray):
            contents.extend(bytes(max(0, offset - len(contents))))
            contents[offset : offset + len(written)] = written

        _find(root, parts[0]).do(write)
    elif kind == "truncate":
        size = int(rest[0])

        def truncate(contents: bytearray):
            contents[:] = contents[:size].ljust(size, b"\0")

        _find(root, parts[0]).do(truncate)
    else:
        parent = _find(root, parts[0][:-1])
        name = parts[0][-1]
        if kind in ("create", "mkdir"):
            new = File() if kind == "create" else Directory()
            parent.do(lambda names: names.__setitem__(name, new))
        elif kind in ("unlink", "rmdir"):
            parent.do(lambda names: names.pop(name))
        else:
            other = parts[1][-1]
            if parts[0][:-1] != parts[1][:-1]:
                # Either directory may reach the disk without the other.
                assert kind == "rename", kind
                moved = parent.names[name]
                parent.do(lambda names: names.pop(name))
                _find(root, parts[1][:-1]).do(lambda names: names.__setitem__(other, moved))
            elif kind == "rename":
                parent.do(lambda names: names.__setitem__(other, names.pop(name)))
            else:
                assert kind == "exchange", kind
                parent.do(lambda names: names.update({name: names[other], other: names[name]}))


def _find(root, parts):
    for part in parts:
        root = root.names[part]
    return root
