"""Tables that fit the width there is: columns that can be spared go, and sentences go below their rows."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_GAP = 2  # between two columns
_LEAST = 16  # what a first column that is too long for its row is given at least
_INDENT = 4


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: its header, in markup.
        cells: of each row, in markup; a cell may have several lines.
        right: whether it is put to the right, as numbers are.
    """

    title: str
    cells: Sequence[str]
    right: bool = True

    @property
    def width(self) -> int:
        """What its longest line needs."""
        lines = [line for cell in (self.title, *self.cells) for line in Text.from_markup(cell).plain.split("\n")]
        return max(map(cell_len, lines))


def plain(
    heads: Sequence[str], rows: Iterable[Sequence[RenderableType]] = (), *, unbroken: Collection[str] = ()
) -> Table:
    """A table of any width, in markup.

    Args:
        heads: one that begins with ``>`` stands over numbers.
        rows: the cells.
        unbroken: the heads of columns that stay on one line, however little room there is.
    """
    found = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for head in heads:
        right = head.startswith(">")
        justify: JustifyMethod = "right" if right else "left"
        found.add_column(head.removeprefix(">"), justify=justify, overflow="fold", no_wrap=head in unbroken)
    for row in rows:
        found.add_row(*row)
    return found


def needed(columns: Sequence[Column]) -> int:
    """The width of a table in which nothing is broken."""
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def fitted(columns: Sequence[Column], spare: Sequence[str], width: int) -> list[Column]:
    """Leave out columns until the others fit, the first of the spare titles first."""
    left = list(columns)
    for title in spare:
        if needed(left) <= width:
            break
        left = [column for column in left if column.title != title]
    return left


def table(columns: Sequence[Column], width: int) -> Table:
    """A table of them; only the first is broken where the rest leaves it too little."""
    return _grid(columns, width, range(len(columns[0].cells)), header=True)


def with_reasons(
    console: Console, columns: Sequence[Column], spare: Sequence[str], title: str, reasons: Sequence[str]
) -> RenderableType:
    """A table that ends with a column of sentences; where they do not fit, they stand below their rows, indented."""
    beside = [*columns, Column(title, reasons, right=False)]
    if needed(beside) <= console.width:
        return table(beside, console.width)
    left = fitted(columns, spare, console.width)
    blocks: list[RenderableType] = [_grid(left, console.width, [], header=True)]
    for row, reason in enumerate(reasons):
        blocks.append(_grid(left, console.width, [row], header=False))
        blocks.append(Padding(Text.from_markup(reason), (0, 0, 0, _INDENT), expand=False))
    return Group(*blocks)


def _grid(columns: Sequence[Column], width: int, rows: Collection[int], *, header: bool) -> Table:
    """Some rows; the widths are those of all of them, so that grids below one another look like one."""
    found = Table(box=None, pad_edge=False, header_style="bold", show_edge=False, show_header=header)
    rest = needed(columns) - columns[0].width
    for place, column in enumerate(columns):
        own = column.width if place else min(column.width, max(width - rest, _LEAST))
        found.add_column(
            column.title, justify="right" if column.right else "left", no_wrap=place > 0, width=own, overflow="fold"
        )
    for row in rows:
        found.add_row(*(column.cells[row] for column in columns))
    return found
