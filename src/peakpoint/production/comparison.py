"""A candidate beside the present holder of an alias, from what is on record of both."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format.manifest import Manifest
from peakpoint.production.paired_test import Paired, paired, unpaired
from peakpoint.repository import validations
from peakpoint.repository.aliases import AliasTarget
from peakpoint.repository.annotations import all_with_annotations
from peakpoint.repository.root import Repository
from peakpoint.repository.run import Run
from peakpoint.repository.validations import Predictions, Validation
from peakpoint.rules import Mode, ranking_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPair:
    """One metric of the present holder and of the candidate.

    Attributes:
        name: the metric's.
        mode: its direction; None when nothing gives one.
        champion: the holder's value.
        candidate: the candidate's value.
        source: ``"validated"`` when both were evaluated in a validation, else ``"recorded"``.
    """

    name: str
    mode: Mode | None
    champion: float
    candidate: float
    source: str

    @property
    def better(self) -> bool | None:
        """Whether the candidate is better; None when that cannot be said."""
        if self.mode is None or self.champion == self.candidate or math.isnan(self.champion - self.candidate):
            return None
        return (self.candidate > self.champion) == (self.mode == "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderComparison:
    """A candidate beside the present holder.

    Attributes:
        champion: ref of the holder.
        metrics: those that both have.
        paired: the test on the predictions that both have made on the same examples; None without such.
        unpaired: why there is none.
        apart: accuracy on examples of their own: the difference, and its interval's ends; None where there is none.
        flips: of the first examples that were right and are wrong now: index, label, what each says.
    """

    champion: str
    metrics: tuple[MetricPair, ...]
    paired: Paired | None
    unpaired: str
    flips: tuple[tuple[int, int, int, int], ...] = ()
    apart: tuple[float, float, float] | None = None

    @property
    def said(self) -> str:
        """In one line."""
        pairs = [f"{one.name} {one.champion:.6g} to {one.candidate:.6g}{_WORDS[one.better]}" for one in self.metrics]
        test = self.paired
        if test is not None:
            pairs.append(
                f"accuracy {test.difference:+.4f} on the same {test.examples:,} examples ({test.confidence:.0%} from "
                f"{test.low:+.4f} to {test.high:+.4f}, p = {test.p_value:.2g}), {test.gained} gained, {test.lost} lost"
            )
        if self.apart is not None:
            difference, low, high = self.apart
            pairs.append(f"accuracy {difference:+.4f} on other examples (95% from {low:+.4f} to {high:+.4f})")
        return "; ".join(pairs) or "nothing that both have"

    def to_json(self) -> dict[str, Any]:
        """For the record: everything but the long list of flips."""
        record = {"said": self.said, **asdict(self)}
        record["metrics"] = [
            asdict(one) | {"champion": _plain(one.champion), "candidate": _plain(one.candidate)} for one in self.metrics
        ]
        if self.paired is not None:
            record["paired"].pop("flips")
        return record


_SHOWN = 10  # examples that flipped
_WORDS = {True: " (better)", False: " (worse)", None: ""}


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def compare_with(
    repository: Repository, run: Run, manifest: Manifest, validation: Validation | None, held: AliasTarget
) -> HolderComparison:
    """A candidate beside the present holder of an alias, from what is recorded of both."""
    try:
        theirs, holder = repository.locate(held.ref)
    except (NotFoundError, CorruptError, FormatError) as error:
        return HolderComparison(
            champion=held.ref, metrics=(), paired=None, unpaired=f"the holder cannot be read: {error}"
        )
    why, before = "", None
    try:
        before = validations.newest(repository.store, held.run, held.checkpoint)
    except (CorruptError, FormatError) as error:
        why = f"the validation of the holder cannot be read: {error}"
    if before is not None and validation is not None and not before.wanted.alike(validation.wanted):
        why, before = f"the two were evaluated otherwise: {_by(before)} and {_by(validation)}", None
    return HolderComparison(
        champion=f"{holder.run}/{holder.name}",
        metrics=tuple(_pairs(theirs, holder, before, run, manifest, validation)),
        **({"paired": None, "unpaired": why} if why else _predicted(repository, before, validation)),
    )


def _by(validation: Validation) -> str:
    asked = validation.wanted
    return ", ".join(one for one in (asked.evaluate, asked.model, asked.golden) if one) or "nothing"


def _pairs(
    theirs: Run, holder: Manifest, before: Validation | None, run: Run, manifest: Manifest, now: Validation | None
) -> Iterator[MetricPair]:
    modes = set(ranking_metrics([*theirs.rules(), *run.rules()]))
    old, new = known_of(theirs, holder), known_of(run, manifest)
    late_old, late_new = ({} if one is None else one.metrics for one in (before, now))
    for name in sorted(old.keys() & new.keys() | late_old.keys() & late_new.keys()):
        both = name in late_old and name in late_new
        directions = [mode for metric, mode in modes if metric == name]
        yield MetricPair(
            name=name,
            mode=directions[0] if len(directions) == 1 else None,
            champion=late_old[name] if both else old[name],
            candidate=late_new[name] if both else new[name],
            source="validated" if both else "recorded",
        )


def known_of(run: Run, manifest: Manifest) -> Mapping[str, float]:
    """Every metric that is recorded of a checkpoint, also what was measured after its commit."""
    return all_with_annotations([manifest], run.events(), ())[0].metrics


def _predicted(repository: Repository, before: Validation | None, now: Validation | None) -> dict[str, Any]:
    """What the predictions of the two say, as members of a ``Comparison``."""
    sides: list[Predictions] = []
    for whose, validation in (("holder", before), ("candidate", now)):
        try:
            kept = None if validation is None else validations.predictions_of(repository.store, validation)
        except (CorruptError, FormatError, NotFoundError) as error:
            return {"paired": None, "unpaired": f"the predictions of the {whose} cannot be read: {error}"}
        if kept is None or not kept.labels:
            return {"paired": None, "unpaired": f"no predictions of the {whose} are kept"}
        sides.append(kept)
    old, new = sides
    if old.of == new.of:
        found = paired(old.predicted, new.predicted, new.labels)
        flips = tuple((at, new.labels[at], old.predicted[at], new.predicted[at]) for at in found.flips[:_SHOWN])
        return {"paired": found, "unpaired": "", "flips": flips}
    before_share, share = _accuracy(old), _accuracy(new)
    low, high = unpaired(before_share, share, len(old.labels), len(new.labels))
    why = "the predictions of the two are not on the same examples"
    return {"paired": None, "unpaired": why, "apart": (share - before_share, low, high)}


def _accuracy(one: Predictions) -> float:
    return sum(map(int.__eq__, one.predicted, one.labels)) / len(one.labels)
