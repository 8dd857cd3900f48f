"""A map of sizes: a rectangle for each value, with an area in proportion to its size.

Subtrees are rectangles with a heading that hold those of their values. A subtree that has only one
child takes no rectangle of its own: its name stands before that of the child.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 1200.0, 480.0
SHOWN = 1500  # values; smaller ones are left out
_HEAD = 16.0  # the height of a heading
_CHARACTER = 6.6  # the width of one


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A place on the map.

    Attributes:
      path: of the value or the subtree.
      name: what is written in it.
      is_value: whether it is a value; otherwise it is a subtree, which lies below its values.
      x, y, width, height: where it is.
    """

    path: str
    name: str
    is_value: bool
    x: float
    y: float
    width: float
    height: float


def rectangles(
    sizes: Mapping[str, int], width: float = WIDTH, height: float = HEIGHT
) -> Iterator[Rectangle]:
    """The rectangles of values, and of the subtrees in which they lie. The largest come first.

    Args:
      sizes: of values, by their paths.
      width, height: of the map.

    >>> for each in rectangles({"a/w": 3, "b": 1}, 400, 100):
    ...     print(each.path, each.is_value, each.width, each.height)
    a/w True 300.0 100.0
    b True 100.0 100.0
    """
    largest = sorted([(n, path) for path, n in sizes.items() if n], key=lambda each: -each[0])
    root = _Subtree("", "")
    for nbytes, path in largest[:SHOWN]:
        root.add(path, nbytes)
    yield from _inside(root, 0.0, 0.0, width, height, 0)


@dataclass(slots=True)
class _Subtree:
    """A subtree with the sizes of its values; a value is one without children."""

    path: str
    name: str
    nbytes: int = 0
    children: dict[str, _Subtree] = field(default_factory=dict)
    is_value: bool = False

    def add(self, path: str, nbytes: int) -> None:
        at = self
        at.nbytes += nbytes
        parts = path.split("/")
        for number, part in enumerate(parts, 1):
            if part not in at.children:
                at.children[part] = _Subtree("/".join(parts[:number]), part)
            at = at.children[part]
            at.nbytes += nbytes
        at.is_value = True

    def without_chain(self) -> _Subtree:
        """The first subtree from here on that has several children, under the names up to it."""
        at, name = self, self.name
        while len(at.children) == 1 and not at.is_value:
            (at,) = at.children.values()
            name = f"{name}/{at.name}"
        return _Subtree(at.path, name, at.nbytes, at.children, at.is_value)


def _inside(
    found: _Subtree, x: float, y: float, width: float, height: float, depth: int
) -> Iterator[Rectangle]:
    children = [child.without_chain() for child in found.children.values()]
    if found.is_value and children:  # a value that lies where a subtree does
        own = found.nbytes - sum([child.nbytes for child in children])
        children.append(_Subtree(found.path, found.name, own, {}, True))
    children = sorted([child for child in children if child.nbytes], key=lambda c: -c.nbytes)
    boxes = squarified([child.nbytes for child in children], x, y, width, height)
    for child, (left, top, across, down) in zip(children, boxes, strict=True):
        if not child.children:
            yield Rectangle(child.path, child.name, True, left, top, across, down)
            continue
        if across > 48 and down > 40 and depth < 5:
            yield Rectangle(child.path, child.name, False, left, top, across, down)
            left, top, across, down = left + 2, top + _HEAD, across - 4, down - _HEAD - 2
        yield from _inside(child, left, top, across, down, depth + 1)


def drawn(
    found: Iterable[Rectangle],
    about: Callable[[str], str],
    marks: Callable[[str], str],
    attributes: str = "",
) -> str:
    """The map as SVG.

    Args:
      found: the rectangles.
      about: a text about the value at a path.
      marks: attributes for the rectangle of the value at a path; they colour it.
      attributes: of the SVG.
    """
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="sizes of the values" '
        f"{attributes}>{''.join([_drawn(each, about, marks) for each in found])}</svg>"
    )


def _drawn(each: Rectangle, about: Callable[[str], str], marks: Callable[[str], str]) -> str:
    across, down = max(each.width - 1.5, 0.3), max(each.height - 1.5, 0.3)
    place = (
        f'x="{each.x:.1f}" y="{each.y:.1f}" width="{across:.1f}" height="{down:.1f}" '
        f'rx="{min(3.0, across / 4, down / 4):.1f}"'
    )
    if not each.is_value:
        name = _text(each.x + 5, each.y + 12, f"{each.name}/", across - 8, ' class="group"')
        return f'<rect class="area" {place}/>{name}'
    name = _text(each.x + 5, each.y + 14, each.name, across - 8) if down > 17 else ""
    return (
        f'<g class="value" data-path="{html.escape(each.path)}">'
        f"<title>{html.escape(about(each.path))}</title>"
        f"<rect {place} {marks(each.path)}/>{name}</g>"
    )


def _text(x: float, y: float, name: str, room: float, attributes: str = "") -> str:
    """A name, or as much of its beginning as there is room for."""
    length = int(room / _CHARACTER)
    if length < min(len(name), 4):
        return ""
    short = name if len(name) <= length else f"{name[: length - 1]}\u2026"
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{html.escape(short)}</text>'


def squarified(
    sizes: Sequence[int], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) that fill a rectangle, with areas in proportion to sizes.

    Rows are laid along the shorter side; a row takes further sizes as long as its rectangles come
    closer to squares (Bruls, Huizing, van Wijk: Squarified Treemaps).

    Args:
      sizes: positive, the largest first.
      x, y, width, height: the rectangle to fill.

    >>> squarified([2, 1, 1], 0, 0, 4, 2)
    [(0, 0, 2.0, 2.0), (2.0, 0, 2.0, 1.0), (2.0, 1.0, 2.0, 1.0)]
    """
    found: list[tuple[float, float, float, float]] = []
    total = sum(sizes)
    scale = width * height / total if total else 0.0
    at = 0
    while at < len(sizes):
        side = min(width, height)
        stop, area = at + 1, sizes[at] * scale
        worst = _worst(area, area, area, side)
        while stop < len(sizes):
            more = area + sizes[stop] * scale
            now = _worst(sizes[at] * scale, sizes[stop] * scale, more, side)
            if now > worst:
                break
            stop, area, worst = stop + 1, more, now
        thickness = area / side if side else 0.0
        place = y if width >= height else x
        for each in sizes[at:stop]:
            length = each * scale / thickness if thickness else 0.0
            if width >= height:
                found.append((x, place, thickness, length))
            else:
                found.append((place, y, length, thickness))
            place += length
        if width >= height:
            x, width = x + thickness, max(width - thickness, 0.0)
        else:
            y, height = y + thickness, max(height - thickness, 0.0)
        at = stop
    return found


def _worst(largest: float, smallest: float, area: float, side: float) -> float:
    """The largest ratio of the sides of the rectangles in a row."""
    if not (area and side and smallest):
        return float("inf")
    return max(side**2 * largest / area**2, area**2 / (side**2 * smallest))
