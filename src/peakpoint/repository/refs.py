"""Refs name a checkpoint in words: ``resnet50@best:val_accuracy``.

====================== ==================================================================================
``RUN@latest``         the newest checkpoint of the run; ``RUN@last`` is the same
``RUN@best``           the best by the metric that the first of the run's rules that ranks goes by
``RUN@best:METRIC``    the best by a metric, in the direction that the run's rules give it
``RUN@best:METRIC:min`` the same with a direction
``RUN:epoch=N``        the newest checkpoint of epoch N (as the loop counts it)
``RUN:STEP``           the newest checkpoint at a step
``RUN/NAME``           by directory name, by id, or by the first characters of an id
``@ALIAS``             what an alias such as ``champion`` or ``resnet50/champion`` points at
``@ALIAS:N``           what its record number N points at
====================== ==================================================================================

Where a run was continued from an older checkpoint, its newest branch comes before abandoned ones.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import check_metric, check_run, did_you_mean
from peakpoint.rules import Mode, Rule, lineage, mode_of, ranked, ranking_metrics

FORMS = "RUN@latest, RUN@best, RUN@best:METRIC[:max|:min], RUN:epoch=N, RUN:STEP, RUN/NAME, @ALIAS, @ALIAS:N"


_NUMBER = re.compile(r"[0-9]{1,1000}")


@dataclass(frozen=True, slots=True)
class Latest:
    """``RUN@latest``."""

    run: str


@dataclass(frozen=True, slots=True)
class BestOf:
    """``RUN@best``, ``RUN@best:METRIC`` or, with a mode, ``RUN@best:METRIC:max``."""

    run: str
    metric: str | None = None
    mode: Mode | None = None


@dataclass(frozen=True, slots=True)
class AtEpoch:
    """``RUN:epoch=N``."""

    run: str
    epoch: int


@dataclass(frozen=True, slots=True)
class AtStep:
    """``RUN:STEP``."""

    run: str
    step: int


@dataclass(frozen=True, slots=True)
class ByName:
    """``RUN/NAME``, where NAME is a directory's name, an id or the beginning of an id."""

    run: str
    name: str


@dataclass(frozen=True, slots=True)
class AliasRef:
    """``@ALIAS``, or with the number of a record ``@ALIAS:N``."""

    alias: str
    number: int | None = None


Ref = Latest | BestOf | AtEpoch | AtStep | ByName
_PLAIN: dict[str, type[Latest | BestOf]] = {"latest": Latest, "last": Latest, "best": BestOf}
_ALIAS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63})?")


def is_alias(name: str) -> bool:
    """Return whether ``name`` can name an alias."""
    return _ALIAS.fullmatch(name) is not None and not any(part.endswith((".", ".json")) for part in name.split("/"))


def check_alias(name: str) -> str:
    """Return ``name`` if it can name an alias: ``NAME`` or ``FAMILY/NAME``.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(name, str) or not is_alias(name):
        raise ConfigError(
            f"{name!r} cannot name an alias: give NAME or FAMILY/NAME, such as champion or resnet50/champion, of ASCII "
            "letters, digits and _.+- (at most 64 each)"
        )
    return name


def is_run(text: str) -> bool:
    """Return whether a text could only name a run."""
    return not any(separator in text for separator in "@:/")


def parse_any(text: str) -> Ref | AliasRef:
    """Read a ref that may also be an alias's; see ``parse``.

    Example:
        >>> parse_any("@resnet50/champion:3")
        AliasRef(alias='resnet50/champion', number=3)
    """
    if not text.startswith("@"):
        return parse(text)
    alias, colon, number = text[1:].partition(":")
    if colon and not (_NUMBER.fullmatch(number) and int(number)):
        raise ConfigError(f"{text!r}: after the colon comes the number of a record of the alias, from 1")
    return AliasRef(check_alias(alias), int(number) if colon else None)


def parse(text: str) -> Ref:
    """Read a ref to a checkpoint of a run that it names.

    Raises:
        ConfigError: the text has none of the forms, which the message lists.

    Example:
        >>> parse("resnet50@best:val/loss:min")
        BestOf(run='resnet50', metric='val/loss', mode='min')
    """
    if text.startswith("@"):
        raise ConfigError(f"{text!r} is an alias; give a checkpoint of a run: RUN@latest, RUN/NAME, ...")
    for separator in text:
        if separator in "@:/":
            run, remainder = text.split(separator, 1)
            break
    else:
        raise ConfigError(
            f"{text!r} names a run but no checkpoint: write {text}@best or {text}@last, for example; forms: {FORMS}"
        )
    check_run(run)
    if separator == "/" and remainder:
        return ByName(run, remainder)
    if separator == ":" and _NUMBER.fullmatch(remainder):
        return AtStep(run, int(remainder))
    if separator == ":" and remainder.startswith("epoch=") and _NUMBER.fullmatch(remainder[6:]):
        return AtEpoch(run, int(remainder[6:]))
    if separator == "@" and remainder in _PLAIN:
        return _PLAIN[remainder](run)
    if separator == "@" and remainder.startswith("best:"):
        metric, *mode = remainder[5:].split(":")
        if len(mode) < 2:
            return BestOf(run, check_metric(metric), mode_of(mode[0]) if mode else None)
    raise ConfigError(f"{text!r} is not a ref; forms: {FORMS}")


def resolve(ref: Ref, records: Sequence[Manifest], rules: Sequence[Rule]) -> Manifest:
    """Return the record that ``ref`` names.

    Args:
        ref: a parsed ref.
        records: the checkpoints of ``ref.run``.
        rules: the rules of the run, which give ``@best`` its direction.

    Raises:
        NotFoundError: no such checkpoint; the message names those that exist.
        ConfigError: ``@best`` without a metric, or without a direction for one, where the rules do not give it.
    """
    if not records:
        raise NotFoundError(f"run {ref.run!r} has no checkpoints yet")
    ordered = sorted(records, key=lambda record: record.sequence)
    current = {record.id for record in lineage(records)}
    # newest last, and the newest branch after abandoned ones
    preferred = sorted(ordered, key=lambda record: (record.id in current, record.sequence))
    match ref:
        case Latest():
            return ordered[-1]
        case BestOf(metric=metric, mode=mode):
            metric = first_metric(ref.run, rules) if metric is None else metric
            if not any(metric in record.metrics for record in ordered):
                return _best(ref.run, ordered, metric, "max")  # which says what metrics there are
            return _best(ref.run, ordered, metric, mode or direction(ref.run, metric, rules))
        case AtEpoch(epoch=epoch):
            return _newest(
                preferred, "epoch", epoch, f"run {ref.run!r} has no checkpoint of epoch {epoch}; it has epochs"
            )
        case AtStep(step=step):
            return _newest(preferred, "step", step, f"run {ref.run!r} has no checkpoint at step {step}; it has steps")
        case ByName(name=name):
            return _by_name(ref.run, ordered, name)


def first_metric(run: str, rules: Sequence[Rule]) -> str:
    """Return the metric of the first rule that ranks, which says what the best of a run is.

    Raises:
        ConfigError: no rule ranks, or the first goes by several metrics.
    """
    ranking = next((rule for rule in rules if rule.ranks_by), None)
    metrics = [] if ranking is None else list(dict.fromkeys(metric for metric, _ in ranking.ranks_by))
    if len(metrics) == 1:
        return metrics[0]
    why = (
        "no rule of this run ranks" if ranking is None else f"its first rule, {ranking.text}, ranks by several metrics"
    )
    raise ConfigError(f"{run}@best: best by what? {why}; give {run}@best:{metrics[0] if metrics else 'METRIC:max'}")


def direction(run: str, metric: str, rules: Sequence[Rule]) -> Mode:
    """Return the direction of a metric, from the rules that rank by it.

    Raises:
        ConfigError: no rule does, or two disagree; the message says how to give it.
    """
    modes = {mode for name, mode in ranking_metrics(rules) if name == metric}
    if len(modes) == 1:
        return modes.pop()
    reason = "rules of this run rank it both ways" if modes else "no rule of this run ranks by it"
    raise ConfigError(f"{run}@best:{metric}: is larger better? {reason}; give {run}@best:{metric}:max or :min")


def _best(run: str, records: list[Manifest], metric: str, mode: Mode) -> Manifest:
    ranking: list[Manifest] = ranked(records, metric, mode)  # type: ignore[assignment]
    if ranking:
        return ranking[0]
    names = sorted({name for record in records for name in record.metrics})
    raise NotFoundError(
        f"no checkpoint of run {run!r} has a finite value of {metric!r}{did_you_mean(metric, names)}; metrics: "
        + (", ".join(names) or "none")
    )


def _newest(records: list[Manifest], attribute: str, number: int, message: str) -> Manifest:
    matches = [record for record in records if getattr(record, attribute) == number]
    if matches:
        return matches[-1]
    existing = {getattr(record, attribute) for record in records} - {None}
    listed = ", ".join(map(str, sorted(existing)[-20:])) or "none"
    raise NotFoundError(f"{message} {'..., ' if len(existing) > 20 else ''}{listed}")


def _by_name(run: str, records: list[Manifest], name: str) -> Manifest:
    exact = [record for record in records if name in (record.name, record.id)]
    matches = exact or [record for record in records if len(name) >= 4 and record.id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    names = [record.name for record in records]
    if matches:
        ids = ", ".join(record.id for record in matches)
        raise NotFoundError(f"{name!r} is the beginning of several ids: {ids}")
    raise NotFoundError(f"run {run!r} has no checkpoint named {name!r}{did_you_mean(name, names)}")
