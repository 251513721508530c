"""The changelog in Markdown: first production, then what was done in runs, day by day."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from itertools import groupby

from peakpoint.errors import printable
from peakpoint.reports.changelog.entries import PRODUCTION, ChangelogEntry
from peakpoint.reports.evaluation.pages import escaped as escaped_markup

MARK = "peakpoint changelog"
FOLD = 3  # entries of one kind, run and day that have a line each
_LONGEST = 400  # characters of a user's text
_AUTOLINK = re.compile(r":(?=//)|(?<=www)\.|@", re.IGNORECASE)


def escaped(text: str) -> str:
    r"""Escape a user's text for one line of Markdown: no markup, HTML, link or terminal code; long text is cut.

    Example:
        >>> print(escaped("# see https://x.org *now*"))
        \# see https\://x.org \*now\*
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return _AUTOLINK.sub(r"\\\g<0>", escaped_markup(text))


def code(text: str) -> str:
    """Format a name as code: nothing in it is read as markup.

    Example:
        >>> code("run/best_model"), code("a`b")
        ('`run/best_model`', '`` a`b ``')
    """
    text = printable(text)
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    space = " " if len(fence) > 1 or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _name(ref: str | None) -> str:
    return "nothing" if ref is None else code(ref)


# --- one entry, one line ------------------------------------------------------------------------------------------

_SENTENCES = {
    "saved": "{checkpoint} saved{why}",
    "imported": "{checkpoint} imported{why}",
    "save failed": "{checkpoint} was not saved{why}",
    "claim lost": "{run}: {rule} moved from {lost_claim} to {new_claim}",
    "removed": "{checkpoint} {removed}{why}",
    "parts dropped": "{parts} of {checkpoint} removed{why}",
    "undone": "{checkpoint} restored from the trash{with_parts}",
    "archived": "{checkpoint} archived{why}",
    "restored": "{checkpoint} restored from the archive{why}",
    "pinned": "{checkpoint} pinned{why}",
    "unpinned": "{checkpoint} unpinned{why}",
    "measured": "{checkpoint} measured{source}: {values}",
    "withdrawn": "measurements of {checkpoint} withdrawn: {before}",
    "begun": "{run} started{why}",
    "continued": "{run} continued from {checkpoint}{why}",
    "rules changed": "rules of {run} changed from {before} to {after}",
    "stopped early": "{run} stopped early{why}",
    "ended": "{run} {ended}",
    "validated": "{checkpoint} validated: {outcome}{why}",
    "promoted": "**{alias}** is now {after} (record {record}{was}){why}{evidence}",
    "rolled back": "**{alias}** rolled back from {before} to {after} (record {record}){why}{evidence}",
    "retired": "**{alias}** retired (record {record}{was}){why}{evidence}",
    "refused": "{checkpoint} did not become **{alias}**{why} (release {release})",
    "damage": "**damage**{why}",
}
_WITH_AUTHOR = {
    *PRODUCTION,
    "removed",
    "pinned",
    "unpinned",
    "undone",
    "measured",
    "withdrawn",
    "archived",
    "restored",
    "begun",
}
_WITH_AUTHOR |= {"continued", "validated", "rules changed"}


def line(entry: ChangelogEntry) -> str:
    """Write an entry as one sentence of Markdown, without its time."""
    sentence = _SENTENCES[entry.kind].format_map(_words(entry))
    shows_author = entry.by and entry.by != "rules" and entry.kind in _WITH_AUTHOR
    return f"{sentence} ({escaped(entry.by)})" if shows_author else sentence


def _words(entry: ChangelogEntry) -> dict[str, str]:
    """What the sentences are made of, escaped."""
    details = entry.details
    before, after, why = escaped(entry.before or ""), escaped(entry.after or ""), escaped(entry.why)
    because, parts = f": {why}" if why else "", escaped(", ".join(details.get("parts") or ()))
    return {
        "alias": escaped(entry.alias or ""),
        "run": _name(entry.run),
        "checkpoint": _name(entry.checkpoint),
        "before": _name(entry.before),
        "after": _name(entry.after),
        "was": "" if entry.before is None else f", was {code(entry.before)}",
        "why": because,
        "record": str(details.get("record")),
        "release": escaped(str(details.get("release"))),
        "evidence": _evidence(entry),
        "rule": code(str(details.get("rule"))),
        "lost_claim": _claim(entry.before),
        "new_claim": _claim(entry.after),
        "removed": "was to be removed, but still exists" if details.get("came_to_nothing") else "removed",
        "parts": parts,
        "with_parts": f": {parts}" if parts else "",
        "source": f" by {why}" if why else "",
        "values": f"{after}, was {before}" if before else after,
        "outcome": "**failed**" if entry.after == "failed" else after,
        "ended": "finished" if entry.why == "closed" else f"ended{because}",
    }


def _evidence(entry: ChangelogEntry) -> str:
    details = entry.details
    evidence = [compared(details.get("comparison"))]
    if details.get("validation"):
        evidence.append(f"validation {escaped(str(details['validation'])[:12])}")
    elif entry.kind == "promoted":
        evidence.append("no validation")
    if details.get("release"):
        evidence.append(f"release {escaped(str(details['release']))}")
    if entry.forced:
        evidence.append("**FORCED** despite: " + "; ".join(map(escaped, details["forced"])))
    return "".join(f"; {text}" for text in evidence if text)


def compared(comparison: object) -> str:
    """Return the summary of the comparison that a record holds, escaped; "" without one."""
    summary = comparison.get("said") if isinstance(comparison, Mapping) else None
    return f"compared: {escaped(str(summary))}" if summary else ""


def _claim(claim: str | None) -> str:
    """A checkpoint, and why a rule claims it."""
    if claim is None:
        return "nothing"
    ref, _, reason = claim.partition(": ")
    return f"{code(ref.partition('/')[2] or ref)} ({escaped(reason)})"


# --- many entries -------------------------------------------------------------------------------------------------

# Kinds of which many in one run and day share a line, and the words of that line.
_TOTALS = {
    "saved": "saved",
    "imported": "imported",
    "save failed": "not saved",
    "removed": "removed",
    "parts dropped": "reduced to some of their parts",
    "undone": "restored from the trash",
    "archived": "archived",
    "restored": "restored from the archive",
    "pinned": "pinned",
    "unpinned": "unpinned",
    "measured": "measured",
    "validated": "validated",
}
_Group = tuple[str | None, str, str]  # run, kind, and the rule of a claim, or "rules" for what rules have removed


def _group(entry: ChangelogEntry) -> _Group:
    if entry.kind == "claim lost":
        return entry.run, entry.kind, str(entry.details.get("rule"))
    return entry.run, entry.kind, "rules" if entry.by == "rules" else ""


def _is_folded(group: _Group, entries: Sequence[ChangelogEntry]) -> bool:
    _, kind, by = group
    if kind == "claim lost":
        return len(entries) > 1 or not entries[0].details.get("ranks")
    return kind in _TOTALS and len(entries) > (1 if by else FOLD)


def folded(entries: Sequence[ChangelogEntry], *, everything: bool) -> list[str]:
    """Write what was done in runs, newest first, with one line for many entries of one kind.

    Args:
        entries: newest first.
        everything: fold nothing.
    """
    groups: dict[_Group, list[ChangelogEntry]] = {}
    for entry in entries:
        groups.setdefault(_group(entry), []).append(entry)
    folds = {group for group, members in groups.items() if not everything and _is_folded(group, members)}
    lines = list(_totals(groups, folds))
    for entry in entries:
        group = _group(entry)
        if group not in folds:
            lines.append(f"- {entry.at:%H:%M} {line(entry)}")
        elif entry.kind == "claim lost" and entry.details.get("ranks") and entry is groups[group][0]:
            lines.append(_moves(groups[group]))
    return lines


def _totals(groups: Mapping[_Group, Sequence[ChangelogEntry]], folds: Iterable[_Group]) -> Iterator[str]:
    """``r: 12 checkpoints saved, 9 removed by rules``: a line for each run."""
    totals: dict[str | None, list[str]] = {}
    order = list(_TOTALS)
    for group in sorted((group for group in folds if group[1] in _TOTALS), key=lambda group: order.index(group[1])):
        run, kind, by = group
        number = len({entry.checkpoint for entry in groups[group]})
        unit = "" if run in totals else f" checkpoint{'' if number == 1 else 's'}"
        totals.setdefault(run, []).append(f"{number:,}{unit} {_TOTALS[kind]}{' by rules' if by else ''}")
    for run in sorted(totals, key=str):
        yield f"- {_name(run)}: {', '.join(totals[run])}"


def _moves(entries: Sequence[ChangelogEntry]) -> str:
    """How the claim of one ranking rule moved; entries newest first."""
    newest, earliest = entries[0], entries[-1]
    rule = code(str(newest.details.get("rule")))
    times = "twice" if len(entries) == 2 else f"{len(entries):,} times"
    path = f"from {_claim(earliest.before)} to {_claim(newest.after)}"
    return f"- {_name(newest.run)}: {rule} moved {times}, {path}"


def by_day(entries: Sequence[ChangelogEntry], title: str, *, everything: bool = False) -> str:
    """Write the changelog: production, damage, then what was done in runs by day; the newest first.

    Args:
        entries: earliest first.
        title: the name of the repository.
        everything: write a line for each save and removal, however many there are.
    """
    lines = [f"<!-- {MARK} -->", "", f"# Changelog of {escaped(title)}", "", _period(entries), ""]
    dated = [entry for entry in reversed(entries) if entry.at is not None]
    production = [f"- {entry.at:%Y-%m-%d %H:%M} {line(entry)}" for entry in dated if entry.kind in PRODUCTION]
    if production:
        summaries = [text for summary in _aliases(entries) for text in (summary, "")]
        lines += ["## Production", "", *summaries, *production, ""]
    damage = [f"- {line(entry)}" for entry in entries if entry.at is None]
    lines += ["## Damage", "", *damage, ""] if damage else []
    for day, of_day in groupby((entry for entry in dated if entry.kind not in PRODUCTION), key=_day):
        lines += [f"## {day}", "", *folded(list(of_day), everything=everything), ""]
    return "\n".join(lines).rstrip() + "\n"


def _day(entry: ChangelogEntry) -> date:
    assert entry.at is not None
    return entry.at.date()


def _period(entries: Sequence[ChangelogEntry]) -> str:
    times = [entry.at for entry in entries if entry.at is not None]
    if not times:
        return "Nothing was recorded in this period."
    number = f"{len(entries):,} {'entry' if len(entries) == 1 else 'entries'}"
    return f"{number} from {times[0]:%Y-%m-%d %H:%M} to {times[-1]:%Y-%m-%d %H:%M} UTC."


def _aliases(entries: Sequence[ChangelogEntry]) -> Iterator[str]:
    """A paragraph for each alias: its first and last checkpoint in the period, and how often it changed."""
    production = [entry for entry in entries if entry.kind in PRODUCTION and entry.alias is not None]
    for alias in sorted({entry.alias or "" for entry in production}):
        of_alias = [entry for entry in production if entry.alias == alias]
        changes = [entry for entry in of_alias if entry.kind != "refused"]
        counts = {kind: sum(entry.kind == kind for entry in of_alias) for kind in PRODUCTION}
        counts["forced"] = sum(entry.forced for entry in of_alias)
        counted = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
        path = f"from {_name(changes[0].before)} to {_name(changes[-1].after)}" if changes else "unchanged"
        yield f"**{escaped(alias)}**: {path} ({counted})."
