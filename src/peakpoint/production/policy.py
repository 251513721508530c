"""Policies: what may become champion, by which checks, by how much better, and who decides; from ``production.toml``.

A repository may have one such file beside its runs, with a table for each alias::

    format = 1

    [champion]
    select = "val_accuracy > 0.9"
    rank = ["max val_accuracy", "min size"]

    [champion.validation]
    with = "checks:evaluate"
    model = "checks:build"

    [champion.improvement]
    metric = "val_accuracy"
    mode = "max"
    minimum = 0.002

Every entry that is left out has a default that refuses less; an entry that nobody knows is an error, since a policy
that is misspelt must not pass for one that asks nothing.
"""

import fnmatch
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from peakpoint.catalogue.query import parse as parse_query
from peakpoint.catalogue.ranking import WithinSE, ranking_keys
from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.amounts import read_duration
from peakpoint.format.names import check_metric, did_you_mean
from peakpoint.format.sealed import digest
from peakpoint.production.validation import check_wanted
from peakpoint.repository.aliases import KEEPS
from peakpoint.repository.refs import check_alias
from peakpoint.repository.validations import MAX_AGE, ValidationSpec
from peakpoint.rules import Mode, mode_of
from peakpoint.store import SMALL, LocalStore, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """How much better a candidate must be than the present holder.

    Attributes:
        metric: by which metric.
        mode: its direction.
        minimum: the least difference, in the metric's unit; 0 asks only that it is not worse.
        significance: the largest p-value of McNemar's test on the predictions that both have made; None asks for none.
    """

    metric: str
    mode: Mode
    minimum: float = 0.0
    significance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """What is told of a change: a command, or an address.

    Attributes:
        command: program and arguments, run without a shell in the directory of the policy; the change as JSON on its
            standard input.
        url: gets the same by POST.
        timeout: seconds.
    """

    command: tuple[str, ...] = ()
    url: str = ""
    timeout: float = 30.0

    @property
    def said(self) -> str:
        """For people."""
        return self.url or " ".join(self.command)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the policy file says of one alias.

    Attributes:
        alias: which.
        select: the condition that candidates meet; see ``peakpoint.catalogue.query``.
        by: what they are ranked by, the most important first; empty when the policy says nothing of releases.
        within: what counts as equally good as the best.
        wanted: what their validation checks.
        max_age: how old a validation may be.
        timeout: seconds that a validation may take.
        improvement: how much better they must be; None asks for nothing.
        may_promote: patterns of who may change the alias, against ``user`` and ``user on host``; empty: everybody.
        keeps: how many former holders retention leaves alone.
        public_key: the key that signatures of promoted checkpoints are made with; None asks for no signature.
        hooks: what is told of each change.
        base: the directory that paths are relative to.
        digest: of the text of the file.
    """

    alias: str
    select: str = ""
    by: Mapping[str, Mode] = field(default_factory=dict)
    within: WithinSE | None = None
    wanted: ValidationSpec = field(default_factory=ValidationSpec)
    max_age: timedelta = MAX_AGE
    timeout: float | None = None
    improvement: Improvement | None = None
    may_promote: tuple[str, ...] = ()
    keeps: int = KEEPS
    public_key: Path | None = None
    hooks: tuple[Hook, ...] = ()
    base: Path = Path()
    digest: str = ""

    def allows(self, actor: str) -> bool:
        """Whether somebody, as ``provenance.present_user`` names them, may change the alias."""
        user = actor.partition(" on ")[0]
        return not self.may_promote or any(
            fnmatch.fnmatchcase(actor, one) or fnmatch.fnmatchcase(user, one) for one in self.may_promote
        )


# --- the file -----------------------------------------------------------------------------------------------------


class _WithinSE(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    n_eval: int | str | None = None
    se: str | None = None
    percent: bool = False


class _Validation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    evaluate: str | None = msgspec.field(default=None, name="with")
    model: str | None = None
    part: str = "model"
    metrics: tuple[str, ...] = ()
    tolerance: float = 1e-3
    sparsity: str = "sparsity"
    golden: str | None = None
    agreement: float = 0.0
    budgets: dict[str, float] = {}
    checks: tuple[str, ...] = ()
    signature: dict[str, str] = {}
    max_age: str | None = None
    timeout: str | None = None


class _Improvement(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    metric: str
    mode: str
    minimum: float = 0.0
    significance: float | None = None


class _Signing(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    public_key: str


class _Hook(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    command: tuple[str, ...] = ()
    url: str = ""
    timeout: str = "30s"


class _Table(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    select: str = ""
    rank: tuple[str, ...] = ()
    within_se: _WithinSE | None = None
    may_promote: tuple[str, ...] = ()
    keep_last: int = KEEPS
    validation: _Validation = msgspec.field(default_factory=_Validation)
    improvement: _Improvement | None = None
    signing: _Signing | None = None
    hooks: tuple[_Hook, ...] = ()


@dataclass(frozen=True, slots=True)
class Policies:
    """What ``production.toml`` says. A table is read when it is asked for: what is wrong with another one bars nobody.

    Attributes:
        content: alias to its table, as TOML gives it.
        text: the file's.
        where: the file.
        base: the directory that paths in it are relative to.
    """

    content: Mapping[str, Any]
    text: str
    where: str
    base: Path

    def of(self, alias: str) -> Policy | None:
        """The policy of an alias; None when there is none for it.

        Raises:
            ConfigError: its table cannot be understood; the message says where and why.
        """
        if alias not in self.content:
            return None
        try:
            return replace(_policy(alias, self.content[alias], self.base), digest=digest(self.text.encode()))
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self.where}, table [{alias}]: {_explained(str(error))}") from error
        except (ConfigError, NotFoundError) as error:
            raise ConfigError(f"{self.where}, table [{alias}]: {error}") from error


def read_policies(store: Store) -> Policies:
    """Read the policy file of a repository; one without a table where there is none.

    Raises:
        ConfigError: the file is no policy.
    """
    where = f"{store.location}/{layout.POLICY}"
    base = store.root if isinstance(store, LocalStore) else Path()
    try:
        data = store.get(layout.POLICY, most=SMALL)
    except NotFoundError:
        return Policies({}, "", where, base)
    return read_text(data, where=where, base=base)


def read_text(data: bytes, *, where: str, base: Path) -> Policies:
    r"""Read the text of a policy file.

    Args:
        data: its bytes, TOML in UTF-8.
        where: the file, for errors.
        base: the directory that paths in it are relative to.

    Raises:
        ConfigError: it is no policy.

    Example:
        >>> found = read_text(b'format = 1\n[champion]\nrank = ["max accuracy"]', where="here", base=Path())
        >>> dict(found.of("champion").by)
        {'accuracy': 'max'}
    """
    try:
        text = data.decode()
        content = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{where} is not TOML in UTF-8: {error}") from error
    if content.pop("format", None) != 1:
        raise ConfigError(f"{where} must begin with format = 1, the only format that this release reads")
    for alias in content:
        check_alias(alias)
    return Policies(content, text, where, base)


_KNOWN: dict[str, type[msgspec.Struct]] = {
    "": _Table,
    "validation": _Validation,
    "improvement": _Improvement,
    "signing": _Signing,
    "within_se": _WithinSE,
    "hooks": _Hook,
}


def _explained(message: str) -> str:
    """A message of msgspec's, with near names for an entry that nobody knows."""
    if "unknown field `" not in message:
        what, _, where = message.partition(" - at `$.")
        return f"{where.strip('`')}: {what}" if where else what
    name = message.partition("unknown field `")[2].partition("`")[0]
    place = message.partition("at `$.")[2].strip("`").partition("[")[0]
    known = [one.encode_name for one in msgspec.structs.fields(_KNOWN[place])]
    return (
        f"there is no entry {name!r}{did_you_mean(name, known)}; "
        f"entries{f' of {place}' if place else ''}: {', '.join(known)}"
    )


def _policy(alias: str, content: Any, base: Path) -> Policy:
    check_alias(alias)
    table = msgspec.convert(content, _Table)
    asked = table.validation
    parse_query(table.select)
    by = dict(map(_rank, table.rank))
    ranking_keys(by)
    if table.select and not by:
        raise ConfigError('it selects, but does not say which is best: rank = ["max METRIC"]')
    if table.keep_last < 1:
        raise ConfigError("keep_last is at least 1: there must be something to roll back to")
    return Policy(
        alias=alias,
        select=table.select,
        by=by,
        within=None if table.within_se is None else WithinSE(**msgspec.structs.asdict(table.within_se)),
        wanted=_wanted(asked, base),
        max_age=MAX_AGE if asked.max_age is None else _span("max_age", asked.max_age),
        timeout=None if asked.timeout is None else _span("timeout", asked.timeout).total_seconds(),
        improvement=None if table.improvement is None else _improvement(table.improvement),
        may_promote=table.may_promote,
        keeps=table.keep_last,
        public_key=None if table.signing is None else base / table.signing.public_key,
        hooks=tuple(map(_hook, table.hooks)),
        base=base,
    )


def _rank(text: str) -> tuple[str, Mode]:
    mode, _, name = text.partition(" ")
    if not name.strip():
        raise ConfigError(f'rank has {text!r}; write "max METRIC" or "min METRIC"')
    return name.strip(), mode_of(mode)


def _wanted(asked: _Validation, base: Path) -> ValidationSpec:
    """What is asked; whether the golden file is there, and what is in it, is seen when it is needed."""
    wanted = ValidationSpec(
        evaluate=asked.evaluate,
        model=asked.model,
        part=asked.part,
        metrics=tuple(map(check_metric, asked.metrics)),
        tolerance=asked.tolerance,
        sparsity=check_metric(asked.sparsity),
        golden=None if asked.golden is None else str(base / asked.golden),
        agreement=asked.agreement,
        budgets=asked.budgets,
        checks=asked.checks,
        signature=asked.signature,
    )
    check_wanted(wanted)
    return wanted


def _improvement(given: _Improvement) -> Improvement:
    return Improvement(
        metric=check_metric(given.metric),
        mode=mode_of(given.mode),
        minimum=_at_least(0, "minimum", given.minimum),
        significance=_significance(given.significance),
    )


def _hook(given: _Hook) -> Hook:
    if bool(given.command) == bool(given.url):
        raise ConfigError('a hook has either command = ["program", "argument"] or url = "http://..."')
    if given.url and not given.url.startswith(("http://", "https://")):
        raise ConfigError(f"a hook's url begins with http:// or https://, not {given.url!r}")
    return Hook(command=given.command, url=given.url, timeout=_span("timeout", given.timeout).total_seconds())


def _span(name: str, given: str) -> timedelta:
    span = read_duration(name, given)
    if not span:
        raise ConfigError(f"{name} = {given!r}: nothing is done in no time; give one such as 30s or 7d")
    return span


def _at_least(least: float, name: str, value: float) -> float:
    if not value >= least:  # NaN is not
        raise ConfigError(f"{name} = {value}: it is at least {least}")
    return value


def _significance(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise ConfigError(f"significance = {value}: it lies between 0 and 1, such as 0.05")
    return value
