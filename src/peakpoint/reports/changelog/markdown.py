"""The account in Markdown: production first, then what was done in runs, day by day."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from itertools import groupby

from peakpoint.reports.changelog.entries import PRODUCTION, ChangelogEntry
from peakpoint.reports.evaluation.pages import escaped as plain
from peakpoint.reports.evaluation.tables import printable

MARK = "peakpoint changelog"
FOLD = 3  # of one kind on one day that are told one by one
_LONGEST = 400  # characters of a text that somebody has given
_UNKNOWN = "at a time that nobody knows"
_AUTOLINK = re.compile(r":(?=//)|(?<=www)\.|@", re.IGNORECASE)

_MANY = {
    "saved": "saved",
    "imported": "imported",
    "save failed": "not saved",
    "removed": "removed",
    "parts dropped": "cut down to some of their parts",
    "undone": "brought back",
    "archived": "archived",
    "restored": "restored from the archive",
    "pinned": "pinned",
    "unpinned": "unpinned",
    "measured": "measured",
    "validated": "validated",
}


def escaped(text: str) -> str:
    r"""Text from users that Markdown shows as it is, on one line: no markup, no HTML, no link, no terminal code.

    What is very long is cut in the middle.

    Example:
        >>> print(escaped("# see https://x.org *now*"))
        \# see https\://x.org \*now\*
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return _AUTOLINK.sub(r"\\\g<0>", plain(text))


def code(text: str) -> str:
    """A name as code: nothing in it is read as markup, whatever it holds.

    Example:
        >>> code("run/best_model"), code("a`b")
        ('`run/best_model`', '`` a`b ``')
    """
    text = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if len(fence) > 1 or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _name(ref: str | None) -> str:
    return "nothing" if ref is None else code(ref)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


# --- one entry, one line ------------------------------------------------------------------------------------------


def line(entry: ChangelogEntry) -> str:
    """An entry in one sentence of Markdown, without its time."""
    said = _SAID[entry.kind](entry)
    by = f" ({escaped(entry.by)})" if entry.by and entry.by != "rules" and entry.kind in _BY else ""
    return said + by


def _because(entry: ChangelogEntry) -> str:
    return f": {escaped(entry.why)}" if entry.why else ""


def _promoted(entry: ChangelogEntry) -> str:
    what = f"**{escaped(entry.alias or '')}** is now {_name(entry.after)}"
    if entry.before is not None:
        what += f", before {_name(entry.before)}"
    return what + f" (record {entry.details.get('record')})" + _because(entry) + _evidence(entry)


def _rolled_back(entry: ChangelogEntry) -> str:
    what = f"**{escaped(entry.alias or '')}** went back to {_name(entry.after)} from {_name(entry.before)}"
    return what + f" (record {entry.details.get('record')})" + _because(entry) + _evidence(entry)


def _retired(entry: ChangelogEntry) -> str:
    what = f"**{escaped(entry.alias or '')}** was retired, and points at nothing; before {_name(entry.before)}"
    return what + f" (record {entry.details.get('record')})" + _because(entry) + _evidence(entry)


def _refused(entry: ChangelogEntry) -> str:
    what = f"{_name(entry.checkpoint)} did not become **{escaped(entry.alias or '')}**"
    return f"{what}{_because(entry)} (release {escaped(str(entry.details.get('release')))})"


def _evidence(entry: ChangelogEntry) -> str:
    found = []
    if said := compared(entry.details.get("comparison")):
        found.append(said)
    if validation := entry.details.get("validation"):
        found.append(f"rests on validation {escaped(str(validation)[:12])}")
    elif entry.kind == "promoted":
        found.append("without a validation")
    if release := entry.details.get("release"):
        found.append(f"release {escaped(str(release))}")
    if entry.forced:
        found.append("**FORCED** although " + "; ".join(escaped(one) for one in entry.details["forced"]))
    return "".join(f"; {one}" for one in found)


def compared(comparison: object) -> str:
    """What a record says of the comparison that was shown before it was made, escaped; "" when it says nothing."""
    said = comparison.get("said") if isinstance(comparison, Mapping) else None
    return f"compared: {escaped(str(said))}" if said else ""


def _plain_kind(verb: str) -> Callable[[ChangelogEntry], str]:
    return lambda entry: f"{_name(entry.checkpoint)} {verb}{_because(entry)}"


def _removed(entry: ChangelogEntry) -> str:
    verb = "was to be removed, and is still here" if entry.details.get("came_to_nothing") else "removed"
    return f"{_name(entry.checkpoint)} {verb}{_because(entry)}"


def _lost(entry: ChangelogEntry) -> str:
    rule = code(str(entry.details.get("rule")))
    return f"{_name(entry.run)}: {rule} moved from {_claim(entry.before)} to {_claim(entry.after)}"


def _claim(claim: str | None) -> str:
    """A checkpoint, and why it is claimed."""
    if claim is None:
        return "nothing"
    ref, _, reason = claim.partition(": ")
    return f"{code(ref.partition('/')[2] or ref)} ({escaped(reason)})"


def _validated(entry: ChangelogEntry) -> str:
    outcome = "**failed**" if entry.after == "failed" else escaped(entry.after or "")
    return f"{_name(entry.checkpoint)} validated: {outcome}{_because(entry)}"


def _measured(entry: ChangelogEntry) -> str:
    was = f", before {escaped(entry.before)}" if entry.before else ""
    by = f" by {escaped(entry.why)}" if entry.why else ""
    return f"{_name(entry.checkpoint)} measured{by}: {escaped(entry.after or '')}{was}"


def _parts(entry: ChangelogEntry) -> str:
    return f"{_name(entry.checkpoint)} lost {escaped(', '.join(entry.details.get('parts', ())))}{_because(entry)}"


def _undone(entry: ChangelogEntry) -> str:
    parts = entry.details.get("parts")
    return f"{_name(entry.checkpoint)} brought back" + (f" with {escaped(', '.join(parts))}" if parts else "")


def _about_run(verb: str) -> Callable[[ChangelogEntry], str]:
    return lambda entry: f"{_name(entry.run)} {verb}{_because(entry)}"


def _ended(entry: ChangelogEntry) -> str:
    return f"{_name(entry.run)} " + ("finished" if entry.why == "closed" else f"ended{_because(entry)}")


def _continued(entry: ChangelogEntry) -> str:
    return f"{_name(entry.run)} continued from {_name(entry.checkpoint)}{_because(entry)}"


def _rules(entry: ChangelogEntry) -> str:
    return f"rules of {_name(entry.run)} changed from {code(entry.before or '')} to {code(entry.after or '')}"


def _damage(entry: ChangelogEntry) -> str:
    return f"**damage**{_because(entry)}"


_SAID: dict[str, Callable[[ChangelogEntry], str]] = {
    "saved": _plain_kind("saved"),
    "imported": _plain_kind("imported"),
    "save failed": _plain_kind("was not saved"),
    "claim lost": _lost,
    "removed": _removed,
    "parts dropped": _parts,
    "undone": _undone,
    "archived": _plain_kind("archived"),
    "restored": _plain_kind("restored from the archive"),
    "pinned": _plain_kind("pinned"),
    "unpinned": _plain_kind("unpinned"),
    "measured": _measured,
    "begun": _about_run("begun"),
    "continued": _continued,
    "rules changed": _rules,
    "stopped early": _about_run("stopped early"),
    "ended": _ended,
    "validated": _validated,
    "promoted": _promoted,
    "rolled back": _rolled_back,
    "retired": _retired,
    "refused": _refused,
    "damage": _damage,
}
_BY = {*PRODUCTION, "removed", "pinned", "unpinned", "undone", "measured", "archived", "restored", "begun", "continued"}
_BY |= {"validated", "rules changed"}


# --- many entries -------------------------------------------------------------------------------------------------


def folded(entries: Sequence[ChangelogEntry], *, everything: bool) -> list[str]:
    """Lines for what was done in runs, newest first; where there is much of one kind, one line for all of it.

    Args:
        entries: newest first.
        everything: fold nothing.
    """
    groups: dict[_Key, list[ChangelogEntry]] = {}
    for entry in entries:
        groups.setdefault(_key(entry), []).append(entry)
    many = {key for key, group in groups.items() if not everything and _is_many(key, group)}
    found = []
    for entry in entries:
        key = _key(entry)
        if key not in many:
            time = "" if entry.at is None else f"{entry.at:%H:%M} "
            found.append(f"- {time}{line(entry)}")
        elif entry is groups[key][0] and entry.kind == "claim lost":
            found.append(f"- {_moved(groups[key])}")
    return [*_totals(groups, many), *found]


_Key = tuple[str | None, str, str]
"""Run, kind, and the rule of a claim; ``"rules"`` for what rules have removed."""


def _key(entry: ChangelogEntry) -> _Key:
    if entry.kind == "claim lost":
        return entry.run, entry.kind, str(entry.details.get("rule"))
    return entry.run, entry.kind, "rules" if entry.by == "rules" else ""


def _is_many(key: _Key, group: Sequence[ChangelogEntry]) -> bool:
    if key[1] == "claim lost":
        return len(group) > 1 or not group[0].details.get("ranks")  # the newest is another one after every save
    return key[1] in _MANY and len(group) > (1 if key[2] else FOLD)


def _totals(groups: Mapping[_Key, Sequence[ChangelogEntry]], many: Iterable[_Key]) -> Iterator[str]:
    """``"r: 12 checkpoints saved, 9 removed by rules"``: a line for each run."""
    runs: dict[str | None, list[_Key]] = {}
    for key in many:
        if key[1] in _MANY:
            runs.setdefault(key[0], []).append(key)
    for run in sorted(runs, key=str):
        said: list[str] = []
        for key in sorted(runs[run], key=lambda key: (list(_MANY).index(key[1]), key)):
            number = len({one.checkpoint for one in groups[key]})
            by = " by rules" if key[2] else ""
            said.append(f"{_count(number, 'checkpoint') if not said else f'{number:,}'} {_MANY[key[1]]}{by}")
        yield f"- {_name(run)}: {', '.join(said)}"


def _moved(group: Sequence[ChangelogEntry]) -> str:
    """How the claim of one rule went on; the newest first."""
    rule = code(str(group[0].details.get("rule")))
    times = ("", "once", "twice")[len(group)] if len(group) < 3 else f"{len(group):,} times"
    first, last = _claim(group[-1].before), _claim(group[0].after)
    return f"{_name(group[0].run)}: {rule} moved on {times}, from {first} to {last}"


def by_day(entries: Sequence[ChangelogEntry], title: str, *, everything: bool = False) -> str:
    """The account: first what happened to aliases, then damage, then what was done in runs by day; the newest first.

    Args:
        entries: earliest first.
        title: what it is of.
        everything: tell each save and removal, however many there are.
    """
    lines = [f"<!-- {MARK} -->", "", f"# Changelog of {escaped(title)}", "", _period(entries), ""]
    dated = [entry for entry in reversed(entries) if entry.at is not None]
    production = [f"- {one.at:%Y-%m-%d %H:%M} {line(one)}" for one in dated if one.kind in PRODUCTION]
    lines += (
        ["## Production", "", *(text for one in _aliases(entries) for text in (one, "")), *production, ""]
        if production
        else []
    )
    damage = [entry for entry in entries if entry.at is None]
    lines += ["## Damage", "", *(f"- {line(one)}" for one in damage), ""] if damage else []
    for day, some in groupby((one for one in dated if one.kind not in PRODUCTION), key=_day):
        lines += [f"## {day}", "", *folded(list(some), everything=everything), ""]
    return "\n".join(lines).rstrip() + "\n"


def _day(entry: ChangelogEntry) -> date:
    assert entry.at is not None
    return entry.at.date()


def _period(entries: Sequence[ChangelogEntry]) -> str:
    times = [entry.at for entry in entries if entry.at is not None]
    if not times:
        return "Nothing was recorded in this time."
    number = f"{len(entries):,} {'entry' if len(entries) == 1 else 'entries'}"
    return f"{number} from {times[0]:%Y-%m-%d %H:%M} to {times[-1]:%Y-%m-%d %H:%M} UTC."


def _aliases(entries: Sequence[ChangelogEntry]) -> Iterator[str]:
    """A paragraph for each alias: what it was at the beginning and is at the end, and how often it changed."""
    names = sorted({one.alias for one in entries if one.alias is not None and one.kind in PRODUCTION})
    for alias in names:
        mine = [one for one in entries if one.alias == alias and one.kind in PRODUCTION]
        done = [one for one in mine if one.kind != "refused"]
        counts = {kind: sum(one.kind == kind for one in mine) for kind in PRODUCTION}
        counts["forced"] = sum(one.forced for one in mine)
        said = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
        if done:
            yield f"**{escaped(alias)}**: from {_name(done[0].before)} to {_name(done[-1].after)} ({said})."
        else:
            yield f"**{escaped(alias)}**: unchanged ({said})."
