"""Tables that fit: columns are left out before a name is broken, and nothing is ever cropped.

    table = FittedTable([Column("layer", 0, "name"), Column("KL", 1), Column("weights", 2)], title="sensitivity")
    table.add_row("model.layers.0.mlp.up_proj", "0.0123", "884,736")
    console.print(table)

Each column has a rank. Columns of rank 0 are always shown; the others are taken in the order of their ranks as long as
there is room, and what is left out is said below the table. Only where the columns of rank 0 alone are too wide is a
name broken, after a dot, a slash or a dash. In a file or a pipe there is room for all. A column without any figure is
left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

NOTHING = ("", "–")
"""Cells that say nothing."""
GAP = 2
"""Columns of the terminal between two columns of a table."""
LEAST_PROSE = 16
LONGEST_WORD = 24
LEAST_NAME = 12


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    heading: str
    """May have several lines."""
    rank: int
    """0: always shown; of the others the smaller come first."""
    kind: Literal["name", "figure", "prose"] = "figure"
    """Names and figures stay on one line; prose is wrapped between words. Figures stand on the right."""


@dataclass
class FittedTable:
    """A table that is laid out when it is shown, for the width that there is then."""

    columns: Sequence[Column]
    title: str | None = None
    rows: list[tuple[tuple[str, ...], str | None]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add_row(self, *cells: str, style: str | None = None) -> None:
        """Adds a row; cells that are not given are empty."""
        if len(cells) > len(self.columns):
            raise ValueError(f"a row of {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append((cells + ("",) * (len(self.columns) - len(cells)), style))

    def add_section(self) -> None:
        """Draws a line, or leaves an empty one, below the rows so far."""
        self.sections.add(len(self.rows))

    def layout(self, width: int) -> tuple[dict[int, int], list[str]]:
        """Returns the columns that fit into `width`, each with its own width, and the headings of the others."""
        said = [index for index in range(len(self.columns)) if self._says_something(index)]
        natural = {index: self._natural(index) for index in said}
        least = {index: self._least(index, natural[index]) for index in said}
        chosen = [index for index in said if self.columns[index].rank == 0]
        for index in sorted(said, key=lambda index: self.columns[index].rank):
            if index not in chosen and _total([least[kept] for kept in (*chosen, index)]) <= width:
                chosen.append(index)
        widths = {index: least[index] for index in sorted(chosen)}
        self._shrink_names(widths, width)
        _widen(widths, natural, width)
        missing = [" ".join(self.columns[index].heading.split()) for index in said if index not in widths]
        return widths, missing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the title, the table and what it leaves out."""
        widths, missing = self.layout(options.max_width)
        if self.title is not None:
            yield Text(self.title, style="italic")
        for line in console.render_lines(self._table(widths), options.update(width=options.max_width), pad=False):
            yield from _without_trailing_space(line)
            yield Segment.line()
        if missing:
            what = ", ".join(missing)
            yield Text(
                f"not shown at {options.max_width} columns: {what} (a wider terminal, a file or a pipe has them)", "dim"
            )

    def _table(self, widths: dict[int, int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for index, width in widths.items():
            column = self.columns[index]
            table.add_column(
                Text(column.heading),
                justify="right" if column.kind == "figure" else "left",
                vertical="top",
                overflow="fold",
                min_width=width,
                max_width=width,
            )
        for number, (cells, style) in enumerate(self.rows, 1):
            shown = (Text(self._cell(index, cells[index], width)) for index, width in widths.items())
            table.add_row(*shown, style=style, end_section=number in self.sections)
        return table

    def _cell(self, index: int, cell: str, width: int) -> str:
        return "\n".join(broken(cell, width)) if self.columns[index].kind == "name" else cell

    def _says_something(self, index: int) -> bool:
        return self.columns[index].rank == 0 or any(cells[index] not in NOTHING for cells, _ in self.rows)

    def _natural(self, index: int) -> int:
        texts = [self.columns[index].heading, *(cells[index] for cells, _ in self.rows)]
        return max(cell_len(line) for text in texts for line in text.splitlines() or [""])

    def _least(self, index: int, natural: int) -> int:
        if self.columns[index].kind != "prose":
            return natural
        words = [word for cells, _ in self.rows for word in cells[index].split()]
        longest = max((cell_len(word) for word in words), default=0)
        return min(natural, max(LEAST_PROSE, min(longest, LONGEST_WORD)))

    def _shrink_names(self, widths: dict[int, int], width: int) -> None:
        """Makes the columns of names narrower where those of rank 0 alone are too wide, and then those of prose."""
        for kind in ("name", "prose"):
            own = [index for index in widths if self.columns[index].kind == kind]
            while (over := _total(list(widths.values())) - width) > 0 and own:
                widest = max(own, key=lambda index: widths[index])
                if widths[widest] <= LEAST_NAME:
                    break
                widths[widest] = max(LEAST_NAME, widths[widest] - (over if len(own) == 1 else 1))


def broken(name: str, width: int) -> Iterator[str]:
    """Yields the lines of a name that has at most `width` columns, broken after a dot, a slash or a dash if it can."""
    for line in name.splitlines() or [""]:
        rest = line
        while cell_len(rest) > width:
            fitting = next(end for end in range(len(rest), 0, -1) if cell_len(rest[:end]) <= width or end == 1)
            ends = [found.end() for found in re.finditer(r"[./\\_:,\s-]+", rest[:fitting])]
            end = ends[-1] if ends and 2 * ends[-1] >= fitting else fitting
            yield rest[:end].rstrip()
            rest = rest[end:]
        yield rest


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _widen(widths: dict[int, int], natural: dict[int, int], width: int) -> None:
    """Gives the room that is left to what is wrapped, in proportion to what it lacks."""
    room = width - _total(list(widths.values()))
    lacking = {index: natural[index] - own for index, own in widths.items() if natural[index] > own}
    if room <= 0 or not lacking:
        return
    share = min(1.0, room / sum(lacking.values()))
    for index, lack in lacking.items():
        widths[index] += int(lack * share)


def _without_trailing_space(line: list[Segment]) -> list[Segment]:
    kept = list(line)
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        text, style, control = kept[-1]
        kept[-1] = Segment(text.rstrip(), style, control)
    return kept


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table; a bar in a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
