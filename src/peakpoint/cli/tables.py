"""Tables that fit the terminal: less important columns are left out, and sentences go below their rows."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_GAP = 2  # between two columns
_NARROWEST = 16  # columns of a first cell that is broken
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
        """The width of its longest line."""
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
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for head in heads:
        right = head.startswith(">")
        justify: JustifyMethod = "right" if right else "left"
        table.add_column(head.removeprefix(">"), justify=justify, overflow="fold", no_wrap=head in unbroken)
    for row in rows:
        table.add_row(*row)
    return table


def full_width(columns: Sequence[Column]) -> int:
    """Return the width of a table in which nothing is broken."""
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def fitted(columns: Sequence[Column], spare: Sequence[str], width: int) -> list[Column]:
    """Leave out columns until the rest fits, the first of the spare titles first."""
    fitting = list(columns)
    for title in spare:
        if full_width(fitting) <= width:
            break
        fitting = [column for column in fitting if column.title != title]
    return fitting


def fitted_table(columns: Sequence[Column], spare: Sequence[str], width: int) -> Table:
    """Make a table without the columns that do not fit, the first of the spare titles first."""
    return table(fitted(columns, spare, width), width)


def table(columns: Sequence[Column], width: int) -> Table:
    """Make a table; only the first column is broken where the others leave it too little width."""
    return _grid(columns, width, range(len(columns[0].cells)), header=True)


def with_reasons(
    console: Console, columns: Sequence[Column], spare: Sequence[str], title: str, reasons: Sequence[str]
) -> RenderableType:
    """Make a table that ends with a column of sentences; where they do not fit, they go below their rows, indented."""
    beside = [*columns, Column(title, reasons, right=False)]
    if full_width(beside) <= console.width:
        return table(beside, console.width)
    columns = fitted(columns, spare, console.width)
    blocks: list[RenderableType] = [_grid(columns, console.width, [], header=True)]
    for row, reason in enumerate(reasons):
        blocks.append(_grid(columns, console.width, [row], header=False))
        blocks.append(Padding(Text.from_markup(reason), (0, 0, 0, _INDENT), expand=False))
    return Group(*blocks)


def _grid(columns: Sequence[Column], width: int, rows: Collection[int], *, header: bool) -> Table:
    """Make a table of some rows, as wide as with all of them, so that tables below one another look like one."""
    grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False, show_header=header)
    others_width = full_width(columns) - columns[0].width
    for place, column in enumerate(columns):
        cells_width = column.width if place else min(column.width, max(width - others_width, _NARROWEST))
        grid.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=place > 0,
            width=cells_width,
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(column.cells[row] for column in columns))
    return grid
