"""The report as one HTML page that needs nothing else, or as Markdown.

The page is the Jinja2 template ``report.html.jinja``. It escapes every text, so none from users can become markup; only
the pictures and the wrapped ids below are marked as safe.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from functools import cache
from typing import Any

from peakpoint.errors import needing, printable
from peakpoint.reports.evaluation.result import Evaluation
from peakpoint.reports.evaluation.tables import CURVE, PEAKS, ReportTable, tables

MARK = "peakpoint report"
TITLE = "Training report"

_LONGEST_ON_ONE_LINE = 20  # characters
_ID = re.compile(r"(/[0-9a-f]{8}(?![^\s;,]))")
_VERDICT_CLASSES = {"peak": "peak", "not finite": "peak", "within noise": "steady", "still improving": "steady"}


def html(evaluation: Evaluation, pictures: Sequence[tuple[str, str]]) -> str:
    """Render the page.

    Args:
        evaluation: what to show.
        pictures: SVG and what it shows, of each picture.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    all_tables = [table.without(CURVE) for table in tables(evaluation)]
    above = max((position + 1 for position, table in enumerate(all_tables) if table.title == PEAKS), default=0)
    return _render(
        location=evaluation.location,
        about=about(evaluation),
        tables_above=all_tables[:above],
        pictures=[_inline(svg, alt, f"p{number}-") for number, (svg, alt) in enumerate(pictures)],
        tables_below=all_tables[above:],
        remarks=evaluation.remarks,
    )


def _render(**values: Any) -> str:
    return str(_template().render(title=TITLE, mark=MARK, **values))


@cache
def _template() -> Any:
    with needing("report", "HTML reports need"):
        from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415 - start-up time
        from markupsafe import Markup, escape  # noqa: PLC0415

    def unbroken(text: str) -> Markup:
        """Keep the id of a ref on one line."""
        return Markup(_ID.sub(r"<span>\1</span>", str(escape(printable(text)))))  # noqa: S704 - escaped before

    environment = Environment(
        loader=PackageLoader("peakpoint.reports.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"printable": printable, "unbroken": unbroken, "cell_class": _cell_class}
    return environment.get_template("report.html.jinja")


def about(evaluation: Evaluation) -> str:
    """Say in a sentence what the report is about."""
    times = [run.history[-1].at for run in evaluation.runs if run.history]
    newest = f", newest report {max(times):%Y-%m-%d %H:%M} UTC" if times else ""
    count = len(evaluation.runs)
    return f"{printable(evaluation.location)}: {count} run{'' if count == 1 else 's'}{newest}"


def _cell_class(column: tuple[str, bool], cell: str) -> str:
    head, is_number = column
    if is_number:
        return "n"
    if head == "verdict":
        return f"tight {_VERDICT_CLASSES.get(cell, '')}".rstrip()
    return "tight" if len(cell) <= _LONGEST_ON_ONE_LINE else ""


def _inline(svg: str, alt: str, prefix: str) -> str:
    """Make a picture a part of a page: without namespaces, in the page's ink, with ids of its own."""
    root = ET.fromstring(svg)  # noqa: S314 - drawn by ourselves a moment ago
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            unique = prefix + value if key == "id" else re.sub(r"(?<=url\(#)|(?<=^#)", prefix, value)
            element.set(key.rpartition("}")[2], unique.replace("#1f1f1e", "currentColor"))
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return ET.tostring(root, encoding="unicode", method="html")


_SPECIAL = re.compile(r"([\\`*_\[\]<>|&~$#!])")


def escaped(text: str) -> str:
    r"""Escape text so that Markdown shows it as it is.

    Example:
        >>> print(escaped("val_<b>|acc"))
        val\_\<b\>\|acc
    """
    return _SPECIAL.sub(r"\\\1", printable(text))


def _markdown_table(table: ReportTable, rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(escaped(head) for head, _ in table.heads) + " |",
        "|" + "|".join("---:" if is_number else "---" for _, is_number in table.heads) + "|",
        *("| " + " | ".join(map(escaped, cells)) + " |" for cells in rows),
    ]


def markdown(evaluation: Evaluation, pictures: Sequence[tuple[str, str]]) -> str:
    """Render the report as Markdown.

    Args:
        evaluation: what to show.
        pictures: the path, relative to the page, and what it shows, of each picture.
    """
    lines = [f"<!-- {MARK} -->", "", f"# {TITLE}", "", escaped(about(evaluation)), ""]
    for table in [table.without(CURVE) for table in tables(evaluation)]:
        lines += [f"## {escaped(table.title)}", ""]
        first, *further = (_markdown_table(table, rows) for rows in table.parts)
        lines += first
        for folded in further:
            lines += ["", "<details>", f"<summary>{len(folded) - 2} more</summary>", "", *folded, "", "</details>"]
        lines += ["", *(f"- {escaped(note)}" for note in table.notes), *([""] if table.notes else [])]
    lines += [line for path, alt in pictures for line in (f"![{escaped(alt)}]({path})", "")]
    lines += [f"- {escaped(remark)}" for remark in evaluation.remarks]
    return "\n".join(lines).rstrip() + "\n"
