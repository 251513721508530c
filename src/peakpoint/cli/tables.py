"""Tables that fit the terminal: less important columns are left out, and sentences go below their rows.

No number is ever broken or cut: where there is too little room for a table, each row becomes a paragraph.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_GAP = 2  # between two columns
_NARROWEST = 16  # columns of a first cell that is broken
_FOLDED = 14  # columns of text that is folded
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


@dataclass(frozen=True, slots=True)
class PlainTable:
    """A table of any width, in markup.

    Attributes:
        heads: one that begins with ``>`` stands over numbers.
        rows: the cells.
        unbroken: the heads of further columns that stay on one line, however little room there is.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    unbroken: Collection[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Make the table, or paragraphs of its rows."""
        columns = [
            Column(head.removeprefix(">"), cells, right=head.startswith(">"))
            for head, *cells in zip(self.heads, *self.rows, strict=True)
        ]
        gaps = _GAP * (len(columns) - 1)
        least = [self._least_width(column) for column in columns]
        if sum(least) + gaps > options.max_width:
            yield _paragraphs(columns, range(len(self.rows)), options.max_width)
            return
        narrow = sum(column.width for column in columns) + gaps > options.max_width
        grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
        for column, width in zip(columns, least, strict=True):
            justify: JustifyMethod = "right" if column.right else "left"
            fixed = width if narrow and (column.right or column.title in self.unbroken) else None
            grid.add_column(column.title, justify=justify, overflow="fold", width=fixed)
        for row in self.rows:
            grid.add_row(*row)
        yield grid

    def _least_width(self, column: Column) -> int:
        """The width that a column needs: only words of its title, and long text, may go on another line."""
        if column.title in self.unbroken:
            return column.width
        cells = Column("", column.cells).width
        words = max(map(cell_len, Text.from_markup(column.title).plain.split()), default=0)
        return max(cells, words) if column.right else min(column.width, _FOLDED)


def _folded(text: Text, width: int) -> Text:
    """Break long names behind a separator: the numbers in them stay in one piece."""
    cuts = [0]
    while len(text.plain) - cuts[-1] > width:
        begin, end = cuts[-1], cuts[-1] + width
        cut = max(text.plain.rfind(separator, begin, end) for separator in " _/:-") + 1
        cuts.append(cut if cut > begin else end)
    return Text("\n").join(text.divide(cuts[1:]))


def _paragraphs(columns: Sequence[Column], rows: Iterable[int], width: int) -> Group:
    """Rows as paragraphs: the first cell, then titles with their cells, as many on a line as fit."""
    lines: list[Text] = []
    for row in rows:
        lines.append(_folded(Text.from_markup(columns[0].cells[row], style="bold"), width))
        for column in columns[1:]:
            cell = ", ".join(column.cells[row].split("\n")).strip()
            pair = Text.assemble("  ", Text.from_markup(f"[dim]{column.title}[/]"), " " if column.title else "")
            pair.append_text(Text.from_markup(cell))
            if cell and lines[-1].cell_len + pair.cell_len > width:
                lines.append(_folded(pair, width))
            elif cell:
                lines[-1].append_text(pair)
    return Group(*lines)


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


def fitted_table(columns: Sequence[Column], spare: Sequence[str], width: int) -> RenderableType:
    """Make a table without the columns that do not fit, the first of the spare titles first."""
    return table(fitted(columns, spare, width), width)


def table(columns: Sequence[Column], width: int) -> RenderableType:
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


def _grid(columns: Sequence[Column], width: int, rows: Collection[int], *, header: bool) -> RenderableType:
    """Make a table of some rows, as wide as with all of them, so that tables below one another look like one."""
    if full_width(columns) - max(columns[0].width - _NARROWEST, 0) > width:
        return _paragraphs(columns, rows, width)
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
        name = Text.from_markup(columns[0].cells[row])
        grid.add_row(_folded(name, grid.columns[0].width or width), *(column.cells[row] for column in columns[1:]))
    return grid
