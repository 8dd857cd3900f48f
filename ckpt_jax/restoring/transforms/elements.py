"""Transforms of the elements themselves: casts, functions and quantized values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import jax
import numpy as np

from ckpt_jax.graph.boxes import Box, shape_of, slices, whole
from ckpt_jax.graph.dtypes import converted, dtype_name, dtype_of
from ckpt_jax.graph.specs import LeafSpec
from ckpt_jax.restoring.formulas import ANY_DTYPE
from ckpt_jax.restoring.transforms.kinds import (
    Each,
    Joining,
    Parts,
    Specs,
    Transform,
    only,
    require_array,
    reshaped,
    sizes_of,
)


@dataclass(frozen=True, slots=True)
class Cast(Each):
    """Converts the values that a rename rule moves, even if `CheckpointOptions.cast` is off.

    Its inverse is no step at all: what was rounded stays so, and a target or `export(cast=...)`
    says which dtype to make of it.

    Args:
      dtype: to convert to; by default the dtype of the target.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"w": np.arange(3.0)})
      ...     target = {"w": np.zeros(3, np.float32)}
      ...     ckpt.restore(path, target, rename=[("w", "w", ckpt.Cast())])
      {'w': array([0., 1., 2.], dtype=float32)}
    """

    keeps_shape: ClassVar[bool] = True
    dtype: Any = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name(np.dtype(self.dtype)))

    def spec(self, specs: Specs) -> LeafSpec:
        (spec,) = specs
        if not (spec.is_array or spec.is_number) or spec.is_bytes:
            raise ValueError(f"{self} needs numbers, and found {spec}")
        kind = "numpy_scalar" if spec.is_number else spec.kind
        return LeafSpec(kind, self.dtype or ANY_DTYPE, spec.shape)

    def pull(self, box: Box, specs: Specs) -> Sequence[Box]:
        return [box]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        part = only(parts)
        if self.dtype is None:
            return part  # converted when the value is assigned to its target
        return converted(part, dtype_of(self.dtype))

    def for_slot(self) -> Cast:
        """`Cast(dtype)` is for the variable; a slot takes the dtype that its optimizer wants."""
        return Cast()

    def inverse(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Map(Each, Joining):
    """Changes the values that a rename rule moves with a function.

    If the saved side of the rule is a tuple of patterns and no other step joins its values, the
    function gets all of them. Before anything is read, it is called with abstract arrays of JAX, or
    if it does not accept these with random ones, to learn the shape and the dtype of what it makes.
    The moments of an optimizer cannot follow a variable through a function.

    Args:
      fn: a function of numpy arrays that returns one. A Python number is an array without axes. It
        is called while 64-bit types are enabled in JAX.
      inverse: a function that undoes it, for the inverse of the rule.
      elementwise: whether each element of the outcome depends on the same element of the arguments
        alone. Then only what a device needs is read; otherwise whole values are.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ckpt.save(f"{directory}/a", {"scale": np.zeros(2)})
      ...     rules = [("scale", "scale", ckpt.Map(lambda x: x + 1, inverse=lambda x: x - 1))]
      ...     ckpt.restore(path, {"scale": np.zeros(2)}, rename=rules)
      {'scale': array([1., 1.])}
    """

    fn: Callable[..., Any]
    inverse_fn: Callable[..., Any] | None = field(default=None, repr=False)
    elementwise: bool = field(default=False, repr=False)

    def __init__(
        self,
        fn: Callable[..., Any],
        inverse: Callable[..., Any] | None = None,
        *,
        elementwise: bool = False,
    ):
        for each in (fn, inverse):
            if not callable(each) and each is not None:
                raise TypeError(f"Map: expected a function, got {each!r}")
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "inverse_fn", inverse)
        object.__setattr__(self, "elementwise", elementwise)

    def __str__(self) -> str:
        return f"Map({getattr(self.fn, '__qualname__', repr(self.fn))})"

    @property
    def is_whole(self) -> bool:
        return not self.elementwise

    def spec(self, specs: Specs) -> LeafSpec:
        for spec in specs:
            if not spec.is_number or spec.is_bytes:
                require_array(spec, self)
            if spec.is_key or spec.dtype == ANY_DTYPE:
                lacks = "has no numbers" if spec.is_key else "has no dtype; give Cast a dtype"
                raise ValueError(f"{self}: {spec} {lacks}")
        shape, dtype = _outcome(self.fn, tuple([(spec.shape, spec.dtype) for spec in specs]))
        if self.elementwise and any(shape != spec.shape for spec in specs):
            listed = ", ".join(map(str, specs))
            raise ValueError(f"{self} is elementwise, and makes shape {shape} of {listed}")
        kind = "numpy" if shape else "numpy_scalar"
        first = replace(specs[0], kind=kind) if specs[0].is_number else specs[0]
        return replace(reshaped(first, shape), dtype=dtype)

    def pull(self, box: Box, specs: Specs) -> Sequence[Box]:
        return [box if self.elementwise else whole(spec.shape) for spec in specs]

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        planned = self.spec(specs)
        arguments = [part for part in parts if part is not None]
        shape = shape_of(box) if self.elementwise else planned.shape
        result = _called(self.fn, arguments)
        if result.shape != shape:
            raise ValueError(f"{self} made shape {result.shape}, and {shape} was planned")
        result = converted(result, dtype_of(planned.dtype))
        return result if self.elementwise else result[slices(box)]

    def for_slot(self) -> None:
        return None

    def inverse(self) -> Map:
        if self.inverse_fn is None:
            raise ValueError(f"{self} has no inverse; give it one with Map(fn, inverse=...)")
        return Map(self.inverse_fn, self.fn, elementwise=self.elementwise)


@dataclass(frozen=True, slots=True)
class Dequantize(Joining):
    """Makes floats of quantized values and their scales: `(value - zero_point) * scale`.

    The saved side of the rule is a tuple of patterns for the values, the scales and, if there are
    any, the zero points. There is no inverse: quantizing loses bits, so it takes a `Map`.

    Args:
      axis: of the value, which a scale with one axis is for.
      block: for each axis of the value, how many elements have one scale. By default the lengths of
        the value divided by those of the scale.
      dtype: of the result.

    Example:
      >>> import ckpt_jax as ckpt, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     tree = {"w": np.array([[1, 2], [3, 4]], np.int8), "w_scale": np.float32([10, 100])}
      ...     path = ckpt.save(f"{directory}/a", tree)
      ...     rules = [(("w", "w_scale"), "w", ckpt.Dequantize())]
      ...     ckpt.restore(path, {"w": np.zeros((2, 2), np.float32)}, rename=rules)
      {'w': array([[ 10.,  20.], [300., 400.]], dtype=float32)}
    """

    axis: int = 0
    block: tuple[int, ...] | None = None
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(np.dtype(self.dtype)))
        if self.block is not None:
            object.__setattr__(self, "block", sizes_of(self.block, self))

    def spec(self, specs: Specs) -> LeafSpec:
        if len(specs) not in (2, 3):
            raise ValueError(
                f"{self} needs values and scales, and perhaps zero points; there are {len(specs)} "
                "patterns"
            )
        for spec in specs:
            require_array(spec, self)
            if spec.is_key:
                raise ValueError(f"{self} needs numbers, and found {spec}")
        for scale in specs[1:]:
            self._blocks(specs[0], scale)
        return replace(reshaped(specs[0], specs[0].shape), dtype=self.dtype)

    def _blocks(self, value: LeafSpec, scale: LeafSpec) -> list[int]:
        """For each axis of the value, how many elements have one scale."""
        lengths = _along(scale.shape, value.shape, self.axis)
        if lengths is None:
            raise ValueError(f"{self}: a scale {scale} does not fit {value}")
        block = self.block if self.block is not None and len(lengths) == len(self.block) else None
        if self.block is not None and block is None:
            raise ValueError(f"{self}: {value} has not as many axes as the block")
        found: list[int] = []
        for axis, (n, m) in enumerate(zip(value.shape, lengths, strict=True)):
            size = n if m == 1 else block[axis] if block else n // m if m else 0
            if m != 1 and (not size or -(-n // size) != m or (not block and n % m)):
                raise ValueError(f"{self}: a scale {scale} does not fit {value}")
            found.append(max(size, 1))
        return found

    def pull(self, box: Box, specs: Specs) -> Sequence[Box]:
        return [box, *[self._box(box, specs[0], scale) for scale in specs[1:]]]

    def _box(self, box: Box, value: LeafSpec, scale: LeafSpec) -> Box:
        """The scales that a box of the value needs."""
        blocks = self._blocks(value, scale)
        wide = [(a // b, max(-(-z // b), a // b)) for (a, z), b in zip(box, blocks, strict=True)]
        if len(scale.shape) == len(value.shape):
            return tuple(wide)
        return (wide[self.axis],) if scale.shape else ()

    def apply(self, box: Box, parts: Parts, specs: Specs) -> np.ndarray:
        value, *others = [part for part in parts if part is not None]
        dtype = dtype_of(self.dtype)
        wide = np.result_type(np.float32, dtype) if dtype.kind in "fc" else np.dtype(np.float32)
        spread = [
            self._spread(part, box, specs[0], spec).astype(wide)
            for part, spec in zip(others, specs[1:], strict=True)
        ]
        result = value.astype(wide)
        if len(spread) == 2:
            result = result - spread[1]
        return converted(np.asarray(result * spread[0]), dtype)

    def _spread(self, part: np.ndarray, box: Box, value: LeafSpec, scale: LeafSpec) -> np.ndarray:
        """The scales, one for each element of the box."""
        if part.ndim < len(box):
            part = part.reshape(_along(part.shape, shape_of(box), self.axis, check=False) or ())
        for axis, ((a, z), b) in enumerate(zip(box, self._blocks(value, scale), strict=True)):
            if part.shape[axis] > 1:
                part = part.take(np.arange(a, z) // b - a // b, axis)
        return part

    def inverse(self) -> Transform:
        raise ValueError(f"{self} has no inverse: quantizing loses bits")

    def for_slot(self) -> None:
        return None


def _along(
    scale: Sequence[int], value: Sequence[int], axis: int, *, check: bool = True
) -> tuple[int, ...] | None:
    """The shape of a scale with as many axes as the value has; None if that does not fit."""
    if len(scale) == len(value):
        return tuple(scale)
    if not scale:
        return (1,) * len(value)
    if len(scale) > 1 or (check and not -len(value) <= axis < len(value)):
        return None
    return tuple([scale[0] if i == axis % len(value) else 1 for i in range(len(value))])


_MAX_OUTCOMES = 256  # of functions, whose results are remembered


@lru_cache(_MAX_OUTCOMES)
def _outcome(
    fn: Callable[..., Any], arguments: tuple[tuple[tuple[int, ...], str], ...]
) -> tuple[tuple[int, ...], str]:
    """The shape and dtype of what a function makes of arrays of these shapes and dtypes.

    Raises:
      ValueError: it cannot be called with such arrays, or makes no array.
    """
    try:
        with jax.enable_x64(True):
            abstract = [jax.ShapeDtypeStruct(shape, dtype_of(d)) for shape, d in arguments]
            result = jax.eval_shape(fn, *abstract)
            return tuple(result.shape), dtype_name(np.dtype(result.dtype))
    except Exception:  # it needs numpy's arrays: whatever is wrong shows when it has them
        pass
    random = np.random.default_rng(0)
    arrays = [np.asarray(random.random(shape)).astype(dtype_of(d)) for shape, d in arguments]
    listed = ", ".join([f"{dtype}{list(shape)}" for shape, dtype in arguments])
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _called(fn, arrays)
        return result.shape, dtype_name(result.dtype)
    except Exception as error:
        raise ValueError(f"the function cannot be applied to {listed}: {error!r}") from error


def _called(fn: Callable[..., Any], arrays: Sequence[np.ndarray]) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(fn(*arrays))
