"""Python state: objects that write themselves as one string."""

from __future__ import annotations


class PythonState:
    """Python state that is saved as one string, which it writes and reads itself.

    Subclasses implement `serialize() -> str | bytes` and `deserialize(value: bytes)`.

    Source: `tf.train.experimental.PythonState`.

    Example:
      >>> import ckpt_jax as ckpt
      >>> class Position(ckpt.PythonState):
      ...     index = 0
      ...     def serialize(self): return str(self.index)
      ...     def deserialize(self, value): self.index = int(value)
    """

    def serialize(self) -> str | bytes:
        """The state as a string; called once per save, while `save` blocks."""
        raise NotImplementedError(_missing(self, "serialize() -> str | bytes"))

    def deserialize(self, value: bytes) -> None:
        """Restores the state from a string that `serialize` gave (text arrives as UTF-8)."""
        raise NotImplementedError(_missing(self, "deserialize(value: bytes)"))


def _missing(state: PythonState, method: str) -> str:
    return f"{type(state).__qualname__}, a subclass of ckpt.PythonState, has to implement {method}"
