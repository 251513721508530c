"""Rules decide which checkpoints are kept, and say why.

A rule is a frozen value with one pure method: ``claims(records)`` names, among the records that exist, those that it
keeps, each with a reason. It keeps no state, so "save this moment?", "keep this checkpoint?", "what would happen under
other rules?" and "what after a restart?" are one calculation:

- a moment is saved if and only if a rule would claim it among the checkpoints that exist (``moment_claims``);
- a checkpoint is kept while a rule claims it (``claims``).

Laws that every rule obeys (tests/rules/test_rules.py proves them): the answer does not depend on the order of the
records; what was claimed stays claimed after everything else but the newest is removed; adding a rule never removes a
claim; a value that is not finite never wins; ties go to the earlier record. ``Budget`` is the exception: it wants less.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import get_args

from peakpoint.errors import ConfigError
from peakpoint.format.names import did_you_mean
from peakpoint.rules.budget import Budget
from peakpoint.rules.metric import Best, BestAtSparsity, MetricRule, Pareto, TopK, smoothed_name
from peakpoint.rules.presets import production, pruning, research
from peakpoint.rules.record import (
    CheckpointRecord,
    Claim,
    Mode,
    Moment,
    NeedsParts,
    Reasons,
    by_sequence,
    check_mode,
    lineage,
    moment_text,
    ranked,
)
from peakpoint.rules.schedule import Every, Last, Thin
from peakpoint.rules.text import FORMS, Rule, mode_of, parse, parse_all

__all__ = [
    "FORMS",
    "Best",
    "BestAtSparsity",
    "Budget",
    "CheckpointRecord",
    "Claim",
    "Every",
    "Last",
    "MetricRule",
    "Mode",
    "Moment",
    "NeedsParts",
    "Pareto",
    "Reasons",
    "Rule",
    "Thin",
    "TopK",
    "by_sequence",
    "check_mode",
    "check_ranking_metrics",
    "check_rules",
    "claims",
    "lineage",
    "mode_of",
    "moment_claims",
    "moment_text",
    "parse",
    "parse_all",
    "production",
    "pruning",
    "ranked",
    "ranking_metrics",
    "research",
    "smoothed_name",
]


def check_rules(keep: object) -> tuple[Rule, ...]:
    """Return ``keep`` as a tuple if it is a list of rules.

    Raises:
        ConfigError: something in it is not a rule.
    """
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise ConfigError(f'keep= takes a list of rules, such as [Best("val_loss", "min"), Last(3)], not {keep!r}')
    rules = tuple(keep)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ConfigError(_no_rule(rule))
    return rules


def _no_rule(value: object) -> str:
    """Say what to write in place of something that is no rule."""
    kinds = get_args(Rule)
    if any(value is kind for kind in kinds):
        return f"keep= has {value.__name__} without arguments; write {value.usage}"  # type: ignore[attr-defined]
    if isinstance(value, str):
        return f"keep= has the text {value!r}; write peakpoint.rules.parse({value!r}), which makes a rule of a text"
    return f"keep= takes rules ({', '.join(kind.__name__ for kind in kinds)}), not {value!r}"


def claims(rules: Iterable[Rule], records: Sequence[CheckpointRecord]) -> dict[str, tuple[Claim, ...]]:
    """Return the claims on each record that is claimed, by its id, in the order of the rules.

    Pure; the answer does not depend on the order of ``records``.

    Args:
        rules: the rules in force.
        records: every checkpoint that exists.
    """
    claims_by_id: dict[str, list[Claim]] = {}
    for rule in rules:
        for id, reason in rule.claims(records).items():  # noqa: A001 - the vocabulary's word
            claims_by_id.setdefault(id, []).append(Claim(rule.text, reason))
    return {id: tuple(reasons) for id, reasons in claims_by_id.items()}  # noqa: A001


def moment_claims(
    rules: Iterable[Rule], existing: Sequence[CheckpointRecord], moment: CheckpointRecord
) -> tuple[Claim, ...]:
    """Return the claims on ``moment`` among ``existing``: it is saved if and only if there is one."""
    records = [*existing, moment]
    reasons = ((rule, rule.claims(records).get(moment.id)) for rule in rules)
    return tuple(Claim(rule.text, reason) for rule, reason in reasons if reason is not None)


def ranking_metrics(rules: Iterable[Rule]) -> tuple[tuple[str, Mode], ...]:
    """Return the metrics that rules rank by, with their directions, in the order of the rules, once each."""
    return tuple(dict.fromkeys(pair for rule in rules for pair in rule.ranks_by))


def check_ranking_metrics(rules: Iterable[Rule], metrics: Collection[str]) -> None:
    """Refuse rules by metrics that nothing has: a misspelt one claims nothing, and the best would go.

    Rules with ``pending=`` are left alone: they wait for values.

    Args:
        rules: those that somebody has written by hand.
        metrics: all that reports and checkpoints have.

    Raises:
        ConfigError: a metric that none of them has; names near ones.

    Example:
        >>> check_ranking_metrics(parse_all("best:val_acuracy:max"), {"val_accuracy"})
        Traceback (most recent call last):
        ...
        peakpoint.errors.ConfigError: no report has the metric 'val_acuracy' of the rule best:val_acuracy:max; did you \
mean 'val_accuracy'?
    """
    for rule in rules:
        if getattr(rule, "pending", 0):
            continue
        sparsity = [rule.sparsity] if isinstance(rule, BestAtSparsity) else []
        for name in [*(name for name, _ in rule.ranks_by), *sparsity]:
            if name not in metrics:
                hint = did_you_mean(name, tuple(metrics)) or _available(metrics)
                raise ConfigError(f"no report has the metric {name!r} of the rule {rule.text}{hint}")


def _available(metrics: Collection[str]) -> str:
    return f"; there are {', '.join(sorted(metrics)[:10])}" if metrics else "; there are no metrics at all"
