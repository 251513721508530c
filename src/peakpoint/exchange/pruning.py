"""Takes out of a value what was not built of its file, and says where it was."""

import argparse
import json
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peakpoint.exchange.pickle_builder import Unbuilt
from peakpoint.exchange.pickles import could_be_inert

_MOST_PLACES = 3  # that a note names


@dataclass(frozen=True, slots=True)
class Gap:
    """A value that was not built.

    Attributes:
        place: where it was, as in ``extra["config"]``.
        name: the full name of its class, or of the function that would have made it.
    """

    place: str
    name: str


class Pruning:
    """Prunes values in place: an entry goes if it, or an element of a list in it, was not built.

    Attributes:
        gaps: what has gone.
    """

    def __init__(self) -> None:
        self.gaps: list[Gap] = []
        self._pruned: dict[int, Gap | None] = {}
        self._alive: list[Any] = []  # an object that is freed would give its id to another

    def prune(self, value: Any, place: str) -> Gap | None:
        """Prune a value; returns why the whole of it cannot stay, None when it can."""
        if isinstance(value, Unbuilt):
            return Gap(place, value.name)
        if id(value) in self._pruned or not isinstance(
            value, dict | list | tuple | set | frozenset | argparse.Namespace
        ):
            return self._pruned.get(id(value))
        self._alive.append(value)
        self._pruned[id(value)] = None
        if isinstance(value, argparse.Namespace):
            self._entries(vars(value), place)
        elif isinstance(value, dict):
            self._entries(value, place)
            if isinstance(value, OrderedDict):
                self._entries(vars(value), place)
        else:
            gaps = (self.prune(child, f"{place}[{index}]") for index, child in enumerate(value))
            self._pruned[id(value)] = next((gap for gap in gaps if gap is not None), None)
        return self._pruned[id(value)]

    def _entries(self, entries: dict[Any, Any], place: str) -> None:
        for key, value in list(entries.items()):
            inner = f"{place}[{json.dumps(key) if isinstance(key, str) else repr(key)[:100]}]"
            gap = self.prune(key, inner) or self.prune(value, inner)
            if gap is not None:
                element = gap.place.removeprefix(inner)
                self.gaps.append(Gap(f"{inner} (because of its {element})" if element else inner, gap.name))
                del entries[key]


def sentences(gaps: Iterable[Gap]) -> list[str]:
    """Return a sentence on the gaps of each class, with what may be done."""
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for gap in gaps:
        by_name[gap.name].append(gap.place)
    texts = []
    for name, places in by_name.items():
        unnamed = len(places) - _MOST_PLACES
        where = ", ".join(places[:_MOST_PLACES]) + (f" and {unnamed} more" if unnamed > 0 else "")
        advice = f"; --inert {name} keeps a record of the values" if could_be_inert(name) else ""
        texts.append(f"{where}: {name} is not built from a file{advice}")
    return texts
