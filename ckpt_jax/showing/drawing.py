"""Tables as `rich` draws them on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from ckpt_jax.showing.rows import Part


def draw(parts: Sequence[Part], stream: TextIO) -> None:
    """Draws an output. Nothing in it is taken for markup."""
    console = Console(file=stream, highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(Text(part))
            continue
        drawn = Drawn(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for number, column in enumerate(part.columns):
            drawn.add_column(
                column, justify="right" if number in part.right else "left", overflow="fold"
            )
        for row in part.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
