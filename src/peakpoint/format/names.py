"""Readable names for runs, checkpoints, parts and metrics.

Names are for people. Identity is an id in the manifest, and no code takes a number back out of a name.
"""

import difflib
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peakpoint.errors import ConfigError, NotFoundError

_RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_METRIC = re.compile(r"[^\s:\x00-\x1f]{1,200}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_METRIC_FIELD = re.compile(r"metrics\[([^\[\]]+)\]")
_LONGEST = 150  # leaves room for a suffix below the 255 bytes that file systems allow
EXTRA = "extra"  # the part of what another tool had beside the states of objects
OWN_PARTS = ("rng", "loop")  # of Peakpoint, not of the user
RESERVED_PARTS = frozenset({"state", "manifest", *OWN_PARTS})

DEFAULT_TEMPLATE = "epoch{epoch}_step{step}_{metric}_{value:.4f}"


def safe(text: str) -> str:
    """Return ``text`` as one path component that no shell and no file system minds.

    Letters, digits and ``._+-`` stay; everything else becomes ``-``; never empty, never hidden, never an option.

    Example:
        >>> safe("val/loss = 0.5 $(rm)")
        'val-loss-0.5-rm'
    """
    cleaned = _UNSAFE.sub("-", text).lstrip("-. ")[:_LONGEST].rstrip("-. ")
    return cleaned or "unnamed"


def check_run(name: str) -> str:
    """Return ``name`` if it can name a run.

    Raises:
        ConfigError: it cannot; the message proposes a name that can.
    """
    if not isinstance(name, str) or not _RUN.fullmatch(name) or name.endswith("."):
        proposal = safe(str(name)).lstrip("+-.")[:100].rstrip("-.") or "run"
        raise ConfigError(
            f"{name!r} cannot name a run: ASCII letters, digits and ._+- only, at most 100; try {proposal!r}"
        )
    return name


def check_text(label: str, text: str) -> str:
    """Return ``text`` if it can be written down.

    Raises:
        ConfigError: it is not a text, or holds lone surrogates (bytes that are not text).
    """
    if not isinstance(text, str):
        raise ConfigError(f"{label} must be a text, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{label} {text!r} cannot be written as UTF-8; give a text without broken bytes") from error
    return text


def check_part(name: str) -> str:
    """Return ``name`` if it can name a part of a checkpoint.

    Raises:
        ConfigError: it cannot, or Peakpoint uses it itself.
    """
    if not isinstance(name, str) or not _PART.fullmatch(name) or name.endswith("."):
        raise ConfigError(f"state has a part {name!r}: a part's name is ASCII letters, digits and ._- only, at most 64")
    if name in RESERVED_PARTS:
        raise ConfigError(
            f"state has a part {name!r}, a name that Peakpoint uses itself; call it my_{name}, for example"
        )
    return name


def check_metric(name: str) -> str:
    """Return ``name`` if it can name a metric (``val/loss`` can; spaces and colons cannot).

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(name, str) or not _METRIC.fullmatch(name) or not _is_unicode(name):
        proposal = re.sub(r"[\s:\x00-\x1f]+", "_", name)[:200] if isinstance(name, str) else ""
        hint = f"; try {proposal!r}" if proposal.strip("_") and _is_unicode(proposal) else ""
        raise ConfigError(
            f"metric {name!r} cannot be used: a metric's name has no spaces, colons or control characters{hint}"
        )
    return name


def _is_unicode(text: str) -> bool:
    """Whether ``text`` can be written at all: lone surrogates cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


class _Fields(string.Formatter):
    """Looks up plain fields and ``metrics[name]`` only: a template reaches no attribute of any object."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, str]:  # noqa: ARG002
        if match := _METRIC_FIELD.fullmatch(field_name):
            name = match[1]
            metrics: Mapping[str, float] = kwargs["metrics"]
            if name not in metrics:
                raise KeyError(name)
            return metrics[name], field_name
        if field_name not in kwargs or field_name == "metrics":
            raise KeyError(field_name)
        return kwargs[field_name], field_name


_FIELDS = ("run", "epoch", "step", "metric", "value", "id", "metrics[NAME]")


def check_template(template: str) -> str:
    """Return ``template`` if every field in it exists and takes its format.

    Raises:
        ConfigError: it does not; the message lists the fields that do.
    """
    try:
        for _, field, spec, conversion in string.Formatter().parse(template):
            if field is None:
                continue
            number = field == "value" or _METRIC_FIELD.fullmatch(field) is not None
            if not (number or field in _FIELDS):
                raise ConfigError(_template_message(template, f"there is no field {field!r}"))
            sample: Any = 0.5 if number else 1 if field in ("epoch", "step") else "x"
            string.Formatter().format_field(
                string.Formatter().convert_field(sample, conversion),
                spec or "",
            )
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(_template_message(template, str(error))) from error
    return template


def _template_message(template: str, why: str) -> str:
    return f"name={template!r} cannot be used: {why}. Fields: {', '.join(_FIELDS)}, with Python's format specifications"


def checkpoint_name(
    template: str,
    *,
    run: str,
    id: str,  # noqa: A002 - the field's name in templates
    step: int,
    epoch: int | None,
    metric: str | None,
    metrics: Mapping[str, float],
) -> str:
    """Fill ``template`` and make the result one safe path component.

    A piece of the template (between underscores) whose field has no value at this moment is left out: a step without
    a validation metric is named ``epoch3_step400``, not ``epoch3_step400_None_None``.

    Args:
        metric: the metric that names the checkpoint, the first that a rule ranks by.
        metrics: all metrics of the moment.

    Example:
        >>> checkpoint_name("epoch{epoch}_{metric}_{value:.2f}", run="r", id="1f", step=9, epoch=63,
        ...                 metric="acc", metrics={"acc": 74.68})
        'epoch63_acc_74.68'
    """
    fields: dict[str, Any] = {"run": run, "id": id, "step": step, "metrics": metrics}
    if epoch is not None:
        fields["epoch"] = epoch
    if metric is not None and metric in metrics:
        fields["metric"], fields["value"] = metric, metrics[metric]
    formatter = _Fields()
    pieces = []
    for piece in _pieces(template):
        try:
            pieces.append(formatter.vformat(piece, (), fields))
        except (KeyError, ValueError, OverflowError):  # no such value now, or one that its format cannot show
            continue
    return safe("_".join(pieces))


def _pieces(template: str) -> list[str]:
    """Split at underscores outside braces."""
    pieces, depth = [""], 0
    for character in template:
        depth += (character == "{") - (character == "}")
        if character == "_" and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def near_names_of(name: str, names: Sequence[str]) -> list[str]:
    """Return the names that somebody may have meant, at most three: those that hold the name, or those like it."""
    longer = [candidate for candidate in names if len(name) > 2 and name.casefold() in candidate.casefold()]
    return longer[:3] or difflib.get_close_matches(name, names, n=3)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"``, or nothing when none of the names is near."""
    similar = near_names_of(name, names)
    return f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""


def no_part(part: str, parts: Iterable[str], *, where: str) -> NotFoundError:
    """Return the error that there is no part of a name, with the parts that there are.

    Args:
        part: the name that was given.
        parts: the names that exist.
        where: the checkpoint or checkpoints.
    """
    names = list(parts)
    message = f"no part {part!r} in {where}{did_you_mean(part, names)}; parts: {', '.join(names) or 'none'}"
    nearest = (near_names_of(part, names) or names)[:1]
    return NotFoundError(message + "".join(f"; write part={name!r} (in the shell --part {name})" for name in nearest))


def listing(names: Sequence[str], limit: int = 5) -> str:
    """Return names for a sentence, at most ``limit`` of them."""
    remainder = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + remainder
