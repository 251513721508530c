"""The account as https://keepachangelog.com/en/1.1.0/ has it: a version for each change of an alias."""

from collections.abc import Iterator, Sequence

from peakpoint.reports.changelog.entries import PRODUCTION, ChangelogEntry
from peakpoint.reports.changelog.markdown import MARK, escaped, folded, line

_SECTIONS = ("Added", "Changed", "Removed", "Fixed", "Security")
_SECTION = {
    "saved": "Added",
    "imported": "Added",
    "begun": "Added",
    "validated": "Added",
    "promoted": "Changed",
    "removed": "Removed",
    "parts dropped": "Removed",
    "retired": "Removed",
    "undone": "Fixed",
    "restored": "Fixed",
    "rolled back": "Fixed",
    "refused": "Security",
    "damage": "Security",
}  # everything else has changed


def keep_a_changelog(entries: Sequence[ChangelogEntry], title: str, *, everything: bool = False) -> str:
    """The account by versions, the newest first.

    A version is a change of an alias; what was done since the one before, in all runs, belongs to it. A promotion that
    was rolled back is marked as yanked. What was forced stands under Security once more, and damage.

    Args:
        entries: earliest first.
        title: what it is of.
        everything: tell each save and removal, however many there are.
    """
    lines = [f"<!-- {MARK} -->", "", "# Changelog", ""]
    about = "[Keep a Changelog](https://keepachangelog.com/en/1.1.0/); a version is a change of an alias"
    lines += [f"What was done in {escaped(title)}. The format is that of {about}. Times are in UTC.", ""]
    yanked = _yanked(entries)
    for version, some in reversed(list(_versions(entries))):
        lines += [_heading(version, yanked), ""]
        for section in _SECTIONS:
            told = list(_section(section, version, some, everything=everything))
            lines += [f"### {section}", "", *told, ""] if told else []
    return "\n".join(lines).rstrip() + "\n"


def _versions(entries: Sequence[ChangelogEntry]) -> Iterator[tuple[ChangelogEntry | None, list[ChangelogEntry]]]:
    """Each version with what belongs to it, itself included; last what is not part of any yet. Damage has no time."""
    found: list[ChangelogEntry] = []
    for entry in entries:
        if entry.at is None:
            continue
        found.append(entry)
        if entry.kind in PRODUCTION and entry.kind != "refused":
            yield entry, found
            found = []
    yield None, [one for one in entries if one.at is None] + found


def _yanked(entries: Sequence[ChangelogEntry]) -> set[tuple[str | None, int]]:
    """Alias and number of the promotions that a roll back has taken back."""
    found = set()
    for entry in entries:
        if entry.kind == "rolled back" and "restores" in entry.details:
            span = range(entry.details["restores"] + 1, entry.details["record"])
            found |= {
                (one.alias, one.details["record"])
                for one in entries
                if one.kind == "promoted" and one.alias == entry.alias and one.details["record"] in span
            }
    return found


def _heading(version: ChangelogEntry | None, yanked: set[tuple[str | None, int]]) -> str:
    if version is None:
        return "## [Unreleased]"
    number = version.details["record"]
    mark = " [YANKED]" if (version.alias, number) in yanked else ""
    return f"## [{escaped(version.alias or '')} {number}] - {version.at:%Y-%m-%d}{mark}"


def _section(
    section: str, version: ChangelogEntry | None, some: Sequence[ChangelogEntry], *, everything: bool
) -> Iterator[str]:
    if version is not None and _SECTION[version.kind] == section:
        yield f"- {line(version)}"
    if section == "Security":
        yield from (f"- forced: {escaped(reason)}" for one in some if one.forced for reason in one.details["forced"])
    mine = [one for one in reversed(some) if one is not version and _SECTION.get(one.kind, "Changed") == section]
    yield from folded(mine, everything=everything, times="%Y-%m-%d %H:%M")
