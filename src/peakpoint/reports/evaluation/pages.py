"""A report as one HTML page that needs nothing else, or as Markdown.

Pages are trees that the standard library serializes, so no text from users can become markup.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from peakpoint.reports.evaluation.tables import CURVE, PEAKS, ReportTable, printable, tables

if TYPE_CHECKING:
    from peakpoint.reports.evaluation import Evaluation

MARK = "peakpoint report"
TITLE = "Training report"

_SECURITY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = "\n" + files("peakpoint.reports.evaluation").joinpath("page.css").read_text(encoding="utf-8")
_SHORT = 20  # characters
_ID = re.compile(r"(/[0-9a-f]{8}(?![^\s;,]))")
_CLASSES = {"peak": "peak", "not finite": "peak", "within noise": "steady", "still improving": "steady"}


def html(found: "Evaluation", pictures: Sequence[tuple[str, str]]) -> str:
    """The page.

    Args:
        found: what to show.
        pictures: SVG and what it shows, of each picture.
    """
    root = ET.Element("html", lang="en")
    head = ET.SubElement(root, "head")
    ET.SubElement(head, "meta", charset="utf-8")
    ET.SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _SECURITY})
    ET.SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    ET.SubElement(head, "meta", name="generator", content=MARK)
    # browsers ask for an icon otherwise
    ET.SubElement(head, "link", rel="icon", href="data:,")
    ET.SubElement(head, "title").text = f"{TITLE}: {printable(found.location)}"
    ET.SubElement(head, "style").text = _CSS
    body = ET.SubElement(root, "body")
    ET.SubElement(body, "h1").text = TITLE
    ET.SubElement(body, "p", {"class": "soft"}).text = about(found)
    shown = [table.without(CURVE) for table in tables(found)]
    above = max((at + 1 for at, table in enumerate(shown) if table.title == PEAKS), default=0)
    for table in shown[:above]:
        _table(body, table)
    for number, (picture, alt) in enumerate(pictures):
        ET.SubElement(body, "figure").append(_inline(picture, alt, f"p{number}-"))
    for table in shown[above:]:
        _table(body, table)
    _notes(body, found.remarks)
    ET.indent(head)
    return f"<!DOCTYPE html>\n{ET.tostring(root, encoding='unicode', method='html')}\n"


def about(found: "Evaluation") -> str:
    """What the report is of, in a sentence."""
    times = [one.history[-1].at for one in found.runs if one.history]
    newest = f", newest report {max(times):%Y-%m-%d %H:%M} UTC" if times else ""
    count = len(found.runs)
    return f"{printable(found.location)}: {count} run{'' if count == 1 else 's'}{newest}"


def _table(body: ET.Element, table: ReportTable) -> None:
    ET.SubElement(body, "h2").text = printable(table.title)
    element = ET.SubElement(ET.SubElement(body, "div", {"class": "wide"}), "table")
    row = ET.SubElement(ET.SubElement(element, "thead"), "tr")
    for head, is_number in table.heads:
        ET.SubElement(row, "th", {"class": "n"} if is_number else {}, scope="col").text = printable(head)
    rows = ET.SubElement(element, "tbody")
    for cells in table.rows:
        row = ET.SubElement(rows, "tr")
        for (head, is_number), cell in zip(table.heads, cells, strict=True):
            kind = "n" if is_number else _kind(head, cell)
            _filled(ET.SubElement(row, "td", {"class": kind} if kind else {}), printable(cell))
    _notes(body, table.notes)


def _kind(head: str, cell: str) -> str:
    if head == "verdict":
        return f"tight {_CLASSES.get(cell, '')}".rstrip()
    return "tight" if len(cell) <= _SHORT else ""  # a short one is not broken, a long one has room


def _filled(element: ET.Element, text: str) -> None:
    """Text in which no id of a ref is broken in two."""
    before, *rest = _ID.split(text)
    element.text = before
    for id, after in zip(rest[::2], rest[1::2], strict=True):  # noqa: A001
        unbroken = ET.SubElement(element, "span")
        unbroken.text, unbroken.tail = id, after


def _notes(body: ET.Element, notes: Sequence[str]) -> None:
    if notes:
        listed = ET.SubElement(body, "ul", {"class": "notes"})
        for note in notes:
            ET.SubElement(listed, "li").text = printable(note)


def _inline(picture: str, alt: str, prefix: str) -> ET.Element:
    """A picture as a part of a page: without namespaces, in the page's ink, with ids of its own."""
    root = ET.fromstring(picture)  # noqa: S314 - drawn by ourselves a moment ago
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            if key == "id":
                value = prefix + value
            value = re.sub(r"(?<=url\(#)|(?<=^#)", prefix, value)
            element.set(key.rpartition("}")[2], value.replace("#1f1f1e", "currentColor"))
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return root


_SPECIAL = re.compile(r"([\\`*_\[\]<>|&~$#!])")


def escaped(text: str) -> str:
    r"""Text that Markdown shows as it is.

    Example:
        >>> print(escaped("val_<b>|acc"))
        val\_\<b\>\|acc
    """
    return _SPECIAL.sub(r"\\\1", printable(text))


def markdown(found: "Evaluation", pictures: Sequence[tuple[str, str]]) -> str:
    """The report as Markdown.

    Args:
        found: what to show.
        pictures: the path, relative to the page, and what it shows, of each picture.
    """
    lines = [f"<!-- {MARK} -->", "", f"# {TITLE}", "", escaped(about(found)), ""]
    for table in [table.without(CURVE) for table in tables(found)]:
        lines += [f"## {escaped(table.title)}", ""]
        lines.append("| " + " | ".join(escaped(head) for head, _ in table.heads) + " |")
        lines.append("|" + "|".join("---:" if is_number else "---" for _, is_number in table.heads) + "|")
        lines += ["| " + " | ".join(map(escaped, cells)) + " |" for cells in table.rows]
        lines += ["", *(f"- {escaped(note)}" for note in table.notes), *([""] if table.notes else [])]
    lines += [line for path, alt in pictures for line in (f"![{escaped(alt)}]({path})", "")]
    lines += [f"- {escaped(remark)}" for remark in found.remarks]
    return "\n".join(lines).rstrip() + "\n"
