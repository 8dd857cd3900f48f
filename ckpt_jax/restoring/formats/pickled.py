"""Pickles as data: no class is looked up, and nothing is called.

A pickle is a program for a machine with a stack. Here it runs on a machine that can build
containers and plain values, and nothing else. If it would import something, there is a `Global`
with its name; if it would call something, a `Call` with function and arguments; if it would ask the
caller for an object, a `Persistent` with its id. What those mean is for the caller to decide.

A pickle may refer to a part of itself many times, and to what contains it. So a walk over the
outcome has to count its steps, and nothing of it must be printed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ckpt_jax.restoring.formats.cursor import Cursor

_MAX_INT_NBYTES = 256
_MAX_STEPS = 1 << 22
_MAX_KEY_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Global:
    """Something that would be imported: `module.name`."""

    name: str


@dataclass(eq=False, slots=True)
class Call:
    """Something that would be called or made.

    Attributes:
      function: a `Global`, as a rule.
      args: of the call.
      state: what the object would be given after it was made.
      items, more: what would be put into it, as into a dict or a list.
    """

    function: Any
    args: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    more: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the function; "" if it is no `Global`."""
        return self.function.name if isinstance(self.function, Global) else ""


@dataclass(frozen=True, slots=True)
class Persistent:
    """Something that lies outside of the pickle."""

    id: Any


class _Mark:
    """Separates the parts of the stack."""


_MARK = _Mark()


def read_pickle(cursor: Cursor) -> Any:
    """The value of the pickle that begins at a cursor, which is left at the end of it.

    Raises:
      ValueError: it is damaged, or uses what no library that is read here does.
    """
    machine = _Machine(cursor)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(
            f"the pickle is damaged at byte {cursor.at}: {type(error).__name__}"
        ) from error


class _Machine:
    def __init__(self, cursor: Cursor):
        self.cursor = cursor
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MAX_STEPS):
            code = self.cursor.take(1)[0]
            if code == 0x2E:  # STOP
                (value,) = self.stack
                return value
            step = _STEPS.get(code)
            if step is None:
                raise ValueError(f"the pickle has the code {code:#x} at byte {self.cursor.at}")
            step(self)
        raise ValueError(f"the pickle has more than {_MAX_STEPS} steps")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def uint(self, nbytes: int) -> int:
        return self.cursor.uint(nbytes)

    def sized(self, width: int) -> bytes:
        """Bytes after their length."""
        return self.cursor.take(self.uint(width))

    def text(self, width: int) -> str:
        return self.sized(width).decode("utf-8", "surrogatepass")

    def integer(self, nbytes: int) -> int:
        if nbytes > _MAX_INT_NBYTES:
            raise ValueError(f"an integer takes {nbytes} bytes")
        return int.from_bytes(self.cursor.take(nbytes), "little", signed=True)

    def marked(self) -> list[Any]:
        """Takes everything above the last mark, and the mark."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                found = self.stack[at + 1 :]
                del self.stack[at:]
                return found
        raise ValueError("a mark is missing")

    def last(self, count: int) -> list[Any]:
        """Takes the last values."""
        if count > len(self.stack):
            raise ValueError("the stack is empty")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def put(self, pairs: list[Any]) -> None:
        """Puts keys and values into the dict on top of the stack."""
        target = self.stack[-1]
        target = target.items if isinstance(target, Call) else target
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("keys and values without a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[key_of(key)] = value

    def extend(self, values: list[Any]) -> None:
        """Adds values to the list on top of the stack."""
        target = self.stack[-1]
        target = target.more if isinstance(target, Call) else target
        if not isinstance(target, list):
            raise ValueError("elements without a list")
        target.extend(values)

    def dict_of_marked(self) -> None:
        pairs = self.marked()
        self.push({})
        self.put(pairs)

    def global_of_lines(self) -> None:
        module, name = self.cursor.line(), self.cursor.line()
        self.push(Global(f"{module.decode()}.{name.decode()}"))

    def global_of_stack(self) -> None:
        module, name = self.last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of something that is imported is no text")
        self.push(Global(f"{module}.{name}"))

    def call(self, count: int) -> None:
        function, args, *named = self.last(count)
        if not all([isinstance(arguments, dict) for arguments in named]):
            raise ValueError("named arguments are no dict")
        self.push(Call(function, args, items=dict(*named)))

    def build(self) -> None:
        (state,) = self.last(1)
        if not isinstance(self.stack[-1], Call):
            raise ValueError("a state without an object")
        self.stack[-1].state = state

    def protocol(self) -> None:
        if (version := self.uint(1)) > 5:
            raise ValueError(f"the pickle has protocol {version}")

    def remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]


def key_of(value: Any, depth: int = 0) -> Any:
    """A value as the key of a dict, if it is one that cannot take long, or too deep, to hash.

    Raises:
      ValueError: it is none.
    """
    if isinstance(value, tuple) and depth < _MAX_KEY_DEPTH:
        return tuple([key_of(part, depth + 1) for part in value])
    if value is None or isinstance(value, str | int | float | bytes | Call | Global):
        return value
    raise ValueError(f"a {type(value).__name__} is no key of a dict")


_STEPS: dict[int, Callable[[_Machine], object]] = {
    0x80: _Machine.protocol,
    0x95: lambda m: m.cursor.take(8),  # FRAME
    0x28: lambda m: m.push(_MARK),
    0x30: lambda m: m.stack.pop(),
    0x31: lambda m: m.marked(),
    0x32: lambda m: m.push(m.stack[-1]),
    0x4E: lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x4B: lambda m: m.push(m.uint(1)),
    0x4D: lambda m: m.push(m.uint(2)),
    0x4A: lambda m: m.push(m.integer(4)),
    0x8A: lambda m: m.push(m.integer(m.uint(1))),
    0x8B: lambda m: m.push(m.integer(m.uint(4))),
    0x47: lambda m: m.push(struct.unpack(">d", m.cursor.take(8))[0]),
    0x58: lambda m: m.push(m.text(4)),
    0x8C: lambda m: m.push(m.text(1)),
    0x8D: lambda m: m.push(m.text(8)),
    0x42: lambda m: m.push(m.sized(4)),
    0x43: lambda m: m.push(m.sized(1)),
    0x8E: lambda m: m.push(m.sized(8)),
    0x55: lambda m: m.push(m.sized(1).decode("latin-1")),  # a str of Python 2
    0x54: lambda m: m.push(m.sized(4).decode("latin-1")),
    0x5D: lambda m: m.push([]),
    0x7D: lambda m: m.push({}),
    0x8F: lambda m: m.push(Call(Global("builtins.set"), ())),
    0x29: lambda m: m.push(()),
    0x85: lambda m: m.push(tuple(m.last(1))),
    0x86: lambda m: m.push(tuple(m.last(2))),
    0x87: lambda m: m.push(tuple(m.last(3))),
    0x74: lambda m: m.push(tuple(m.marked())),
    0x6C: lambda m: m.push(m.marked()),
    0x64: _Machine.dict_of_marked,
    0x91: lambda m: m.push(Call(Global("builtins.frozenset"), (m.marked(),))),
    0x61: lambda m: m.extend(m.last(1)),
    0x65: lambda m: m.extend(m.marked()),
    0x90: lambda m: m.extend(m.marked()),
    0x73: lambda m: m.put(m.last(2)),
    0x75: lambda m: m.put(m.marked()),
    0x63: _Machine.global_of_lines,
    0x93: _Machine.global_of_stack,
    0x52: lambda m: m.call(2),  # REDUCE
    0x81: lambda m: m.call(2),  # NEWOBJ
    0x92: lambda m: m.call(3),  # NEWOBJ_EX
    0x62: _Machine.build,
    0x51: lambda m: m.push(Persistent(*m.last(1))),
    0x71: lambda m: m.remember(m.uint(1)),
    0x72: lambda m: m.remember(m.uint(4)),
    0x94: lambda m: m.remember(len(m.memo)),
    0x68: lambda m: m.push(m.memo[m.uint(1)]),
    0x6A: lambda m: m.push(m.memo[m.uint(4)]),
}
