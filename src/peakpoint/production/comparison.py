"""Compare a candidate with the current holder of an alias, from what is on record of both."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import json_value
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
    """One metric of the current holder and of the candidate.

    Attributes:
        mode: its direction; None when no rule gives one.
        champion: the holder's value.
        source: ``"validated"`` when both were evaluated in a validation, else ``"recorded"``.
    """

    name: str
    mode: Mode | None
    champion: float
    candidate: float
    source: str

    @property
    def better(self) -> bool | None:
        """Return whether the candidate is better; None when that cannot be said."""
        if self.mode is None or self.champion == self.candidate or math.isnan(self.champion - self.candidate):
            return None
        return (self.candidate > self.champion) == (self.mode == "max")

    @property
    def text(self) -> str:
        """The pair for people."""
        verdict = {True: " (better)", False: " (worse)", None: ""}[self.better]
        return f"{self.name} {self.champion:.6g} to {self.candidate:.6g}{verdict}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderComparison:
    """A candidate beside the current holder.

    Attributes:
        champion: ref of the holder.
        metrics: those that both have.
        paired: the test on the predictions that both have made on the same examples; None without such.
        unpaired: why there is none.
        flips: of the first examples that were right and are wrong now: index, label, the class that each predicts.
        apart: accuracy on different examples: the difference, and its interval's ends; None where there is none.
    """

    champion: str
    metrics: tuple[MetricPair, ...] = ()
    paired: Paired | None = None
    unpaired: str = ""
    flips: tuple[tuple[int, int, int, int], ...] = ()
    apart: tuple[float, float, float] | None = None

    @property
    def said(self) -> str:
        """The comparison in one line."""
        texts = [pair.text for pair in self.metrics]
        test = self.paired
        if test is not None:
            texts.append(
                f"accuracy {test.difference:+.4f} on the same {test.examples:,} examples ({test.confidence:.0%} from "
                f"{test.low:+.4f} to {test.high:+.4f}, p = {test.p_value:.2g}), {test.gained} gained, {test.lost} lost"
            )
        if self.apart is not None:
            difference, low, high = self.apart
            texts.append(f"accuracy {difference:+.4f} on other examples (95% from {low:+.4f} to {high:+.4f})")
        return "; ".join(texts) or "no metric that both have"

    def to_json(self) -> dict[str, Any]:
        """The comparison for the record: everything but the long list of flips."""
        record: dict[str, Any] = {"said": self.said, **asdict(self)}
        if self.paired is not None:
            record["paired"].pop("flips")
        return {name: json_value(value) for name, value in record.items()}


_LISTED = 10  # examples that flipped


def compare_with(
    repository: Repository, run: Run, manifest: Manifest, validation: Validation | None, holder: AliasTarget
) -> HolderComparison:
    """Compare a candidate with the current holder of an alias, from what is recorded of both."""
    try:
        holder_run, holder_manifest = repository.locate(holder.ref)
    except (NotFoundError, CorruptError, FormatError) as error:
        return HolderComparison(champion=holder.ref, unpaired=f"the current holder cannot be read: {error}")
    reason, earlier = "", None
    try:
        earlier = validations.newest(repository.store, holder.run, holder.checkpoint)
    except (CorruptError, FormatError) as error:
        reason = f"the validation of the current holder cannot be read: {error}"
    if earlier is not None and validation is not None and not earlier.wanted.alike(validation.wanted):
        reason, earlier = f"the two were evaluated differently: {_means(earlier)} and {_means(validation)}", None
    comparison = HolderComparison(
        champion=f"{holder_manifest.run}/{holder_manifest.name}",
        metrics=tuple(_pairs((holder_run, holder_manifest, earlier), (run, manifest, validation))),
        unpaired=reason,
    )
    return comparison if reason else _with_predictions(comparison, repository, earlier, validation)


def _means(validation: Validation) -> str:
    wanted = validation.wanted
    return ", ".join(text for text in (wanted.evaluate, wanted.model, wanted.golden) if text) or "nothing"


_Side = tuple[Run, Manifest, Validation | None]


def _pairs(champion: _Side, candidate: _Side) -> Iterator[MetricPair]:
    modes = set(ranking_metrics([*champion[0].rules(), *candidate[0].rules()]))
    recorded = [known_of(run, manifest) for run, manifest, _ in (champion, candidate)]
    validated = [{} if validation is None else validation.metrics for _, _, validation in (champion, candidate)]
    in_both = validated[0].keys() & validated[1].keys()
    for name in sorted(recorded[0].keys() & recorded[1].keys() | in_both):
        old, new = validated if name in in_both else recorded
        directions = [mode for metric, mode in modes if metric == name]
        yield MetricPair(
            name=name,
            mode=directions[0] if len(directions) == 1 else None,
            champion=old[name],
            candidate=new[name],
            source="validated" if name in in_both else "recorded",
        )


def known_of(run: Run, manifest: Manifest) -> Mapping[str, float]:
    """Every metric that is recorded of a checkpoint, also what was measured after its commit."""
    return all_with_annotations([manifest], run.events(), ())[0].metrics


def _with_predictions(
    comparison: HolderComparison, repository: Repository, earlier: Validation | None, validation: Validation | None
) -> HolderComparison:
    """Add what the stored predictions of the two say."""
    sides: list[Predictions] = []
    for side, source in (("the current holder", earlier), ("the candidate", validation)):
        try:
            predictions = None if source is None else validations.predictions_of(repository.store, source)
        except (CorruptError, FormatError, NotFoundError) as error:
            return replace(comparison, unpaired=f"the predictions of {side} cannot be read: {error}")
        if predictions is None or not predictions.labels:
            reason = f"{side} has no stored predictions; validate it with --golden or --with to store them"
            return replace(comparison, unpaired=reason)
        sides.append(predictions)
    old, new = sides
    if old.of == new.of:
        test = paired(old.predicted, new.predicted, new.labels)
        flips = tuple((row, new.labels[row], old.predicted[row], new.predicted[row]) for row in test.flips[:_LISTED])
        return replace(comparison, paired=test, flips=flips)
    old_accuracy, new_accuracy = _accuracy(old), _accuracy(new)
    low, high = unpaired(old_accuracy, new_accuracy, len(old.labels), len(new.labels))
    reason = "the predictions of the two are on different examples"
    return replace(comparison, unpaired=reason, apart=(new_accuracy - old_accuracy, low, high))


def _accuracy(predictions: Predictions) -> float:
    return sum(map(int.__eq__, predictions.predicted, predictions.labels)) / len(predictions.labels)
