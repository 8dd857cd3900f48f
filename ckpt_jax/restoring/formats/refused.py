"""Formats that are recognised and refused, with a word on where to go.

Without this, the error would only say that there is no checkpoint.
"""

from __future__ import annotations

from typing import NoReturn

from ckpt_jax.errors import UnsupportedFormatError
from ckpt_jax.readers import Format
from ckpt_jax.store.looks import head_of

_ADVICE = {
    "gguf": (
        b"GGUF",
        "a GGUF file, whose arrays are quantised in blocks. Open the model that it was made of, "
        "which usually is a directory of safetensors",
    ),
    "pickle": (
        b"\x80",
        "a pickle. To read it would mean to run whatever code it names. Load it in a program that "
        "trusts it, and save the tree with ckpt.save",
    ),
}
_PROTOCOLS = (2, 3, 4, 5)


def _format(name: str, start: bytes, what: str) -> Format:
    def recognises(path: str) -> bool:
        found = head_of(path, 8)
        if name == "pickle":
            return len(found) > 2 and found[:1] == start and found[1] in _PROTOCOLS
        return found.startswith(start)

    def refuse(path: str) -> NoReturn:
        raise UnsupportedFormatError(f"{path} is {what}.")

    return Format(name, recognises, refuse)


REFUSED: tuple[Format, ...] = tuple([_format(name, *rest) for name, rest in _ADVICE.items()])
