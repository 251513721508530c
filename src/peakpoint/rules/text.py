"""The compact text form of rules: ``"best:val_accuracy:max last:3 every:10ep"``."""

import re
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.rules.budget import Budget
from peakpoint.rules.metric import Best, BestAtSparsity, Pareto, TopK
from peakpoint.rules.record import Mode
from peakpoint.rules.schedule import Every, Last, Thin

Rule = Best | TopK | BestAtSparsity | Pareto | Every | Last | Thin | Budget

FORMS = (
    "best:METRIC:max topk:METRIC:min:K best-at:METRIC:max:SPARSITY:0.5,0.9:0.01 pareto:METRIC:max:METRIC:min "
    "every:10ep every:500st every:60min:24 last:N thin:2 budget:50GB; rules by metrics may end with :min_epoch=N "
    ":warmup=STEPS :pending=N, best also with :smooth=N, all but budget with :parts=model+ema"
)

_EVERY = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?)(?P<unit>ep(?:ochs?)?|st(?:eps?)?|min(?:utes?)?)")
_OPTION = re.compile(r"(?P<name>smooth|min_epoch|warmup|pending)=(?P<value>[0-9]{1,18})")


def parse(text: str) -> Rule:
    """Read one rule in its compact form, the inverse of ``rule.text``; units may be written out (``every:10epochs``).

    Raises:
        ConfigError: the text is not a rule; the message shows the forms.

    Example:
        >>> parse("every:10ep").epochs
        10
        >>> parse("every:90minutes:24").text
        'every:90min:24'
        >>> parse("best:loss:min:smooth=5").smooth
        5
    """
    if not isinstance(text, str):
        raise ConfigError(f'a rule in its compact form is a text such as "best:val_loss:min", not {text!r}')
    kind, *arguments = text.split(":")
    options: dict[str, Any] = {}
    parts = None
    if arguments and arguments[-1].startswith("parts="):
        parts = tuple(arguments[-1].removeprefix("parts=").split("+"))
        arguments = arguments[:-1]
    while arguments and (option := _OPTION.fullmatch(arguments[-1])) and option["name"] not in options:
        options[option["name"]] = int(option["value"])
        arguments = arguments[:-1]
    try:
        rule = _metric_rule(kind, arguments, {**options, "parts": parts})
        if rule is None and not options:
            rule = _other_rule(kind, arguments, parts)
    except ConfigError as error:
        raise ConfigError(f"rule {text[:200]!r}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"rule {text[:200]!r} has a number that cannot be read; write {_forms(kind, [*arguments, ''])}"
        ) from error
    if rule is None:
        raise ConfigError(f"{text[:200]!r} is not a rule; write {_forms(kind, [*arguments, ''])}")
    return rule


def _forms(kind: str, arguments: list[str]) -> str:
    """Return how rules of one kind are written, or all of them."""
    forms = [form for form in FORMS.partition("; ")[0].split() if form.startswith(f"{kind}:")]
    if not forms:
        return f"one of: {FORMS}"
    direction = " (max where larger is better, min where smaller is)" if "METRIC" in forms[0] else ""
    return " or ".join(form.replace("METRIC", arguments[0] or "METRIC", 1) for form in forms) + direction


def parse_all(text: str) -> tuple[Rule, ...]:
    """Read rules that are separated by spaces.

    Example:
        >>> [rule.text for rule in parse_all("last:3 thin:2")]
        ['last:3', 'thin:2']
    """
    return tuple(parse(word) for word in text.split())


def _metric_rule(kind: str, arguments: list[str], options: dict[str, Any]) -> Rule | None:
    match kind, arguments:
        case "best", [metric, mode]:
            return Best(metric, mode_of(mode), **options)
        case "topk", [metric, mode, k]:
            return TopK(metric, mode_of(mode), whole_number(k), **options)
        case "best-at", [metric, mode, sparsity, targets, tolerance]:
            numbers = tuple(float(target) for target in targets.split(","))
            return BestAtSparsity(metric, mode_of(mode), numbers, float(tolerance), sparsity, **options)
        case "pareto", [*pairs] if len(pairs) >= 4 and len(pairs) % 2 == 0:
            objectives = zip(pairs[::2], map(mode_of, pairs[1::2]), strict=True)
            return Pareto(tuple(objectives), **options)
        case _:
            return None


def _other_rule(kind: str, arguments: list[str], parts: tuple[str, ...] | None) -> Rule | None:
    match kind, arguments:
        case "last", [n]:
            return Last(whole_number(n), parts=parts)
        case "thin", [base]:
            return Thin(whole_number(base), parts=parts)
        case "budget", [limit] if parts is None:
            return Budget(int(limit) if limit.isascii() and limit.isdecimal() else limit)
        case "every", [interval, *keep] if len(keep) < 2 and (match := _EVERY.fullmatch(interval)):
            count = whole_number(keep[0]) if keep else None
            number = match["number"]
            match match["unit"][:2]:
                case "ep":
                    return Every(epochs=int(number), keep=count, parts=parts)
                case "st":
                    return Every(steps=int(number), keep=count, parts=parts)
                case _:
                    return Every(minutes=int(number) if number.isdigit() else float(number), keep=count, parts=parts)
        case _:
            return None


def whole_number(text: str) -> int:
    """Read a whole number; ConfigError when it is none."""
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{text!r} is not a whole number")
    return int(text)


def mode_of(text: str) -> Mode:
    """Read a mode; ConfigError when it is none."""
    if text == "max":
        return "max"
    if text == "min":
        return "min"
    raise ConfigError(f'mode must be "max" or "min", not {text!r}')
