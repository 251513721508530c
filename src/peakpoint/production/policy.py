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

Every entry that is left out has a default that refuses less. An unknown entry is an error: a misspelt policy must not
pass for one that asks nothing.
"""

import fnmatch
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
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
from peakpoint.repository.refs import AliasRef, check_alias, parse_any
from peakpoint.repository.validations import MAX_AGE, ValidationSpec
from peakpoint.rules import Mode, mode_of
from peakpoint.store import SMALL, LocalStore, Store


class ValidationPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The checks that a candidate must pass: the members of ``ValidationSpec``, and how long a validation counts.

    Attributes:
        max_age: the age from which on a validation does not count, such as ``"7d"``.
        timeout: how long a validation may take, such as ``"10min"``; None for no limit.
    """

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

    def __post_init__(self) -> None:
        for metric in (*self.metrics, self.sparsity):
            check_metric(metric)
        for name in ("max_age", "timeout"):
            if getattr(self, name) is not None:
                _positive_duration(name, getattr(self, name))


class Improvement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much better a candidate must be than the current holder.

    Attributes:
        minimum: the least difference, in the metric's unit; 0 asks only that it is not worse.
        significance: the largest p-value of McNemar's test on the predictions that both have made; None asks for none.
    """

    metric: str
    mode: str
    minimum: float = 0.0
    significance: float | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)
        mode_of(self.mode)
        if not 0 <= self.minimum < math.inf:  # NaN is not
            raise ConfigError(f"minimum = {self.minimum}: it must be a number of at least 0")
        if self.significance is not None and not 0 < self.significance < 1:
            raise ConfigError(f"significance = {self.significance}: it lies between 0 and 1, such as 0.05")


class SigningPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The key that promoted checkpoints must be signed with; a path relative to the policy."""

    public_key: str


class Hook(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A receiver of changes: a command, or an address.

    Attributes:
        command: program and arguments, run without a shell in the directory of the policy; the change as JSON on its
            standard input.
        url: gets the same by POST.
        timeout: how long it may take, such as ``"30s"``.
    """

    command: tuple[str, ...] = ()
    url: str = ""
    timeout: str = "30s"

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ConfigError('a hook has either command = ["program", "argument"] or url = "http://..."')
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"the url of a hook begins with http:// or https://, not {self.url!r}")
        _positive_duration("timeout", self.timeout)

    @property
    def label(self) -> str:
        """The hook for people."""
        return self.url or " ".join(self.command)

    @property
    def seconds(self) -> float:
        """The timeout in seconds."""
        return read_duration("timeout", self.timeout).total_seconds()


class PolicyTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table of one alias, entry by entry as it stands in the file.

    Attributes:
        select: the condition that candidates meet; see ``peakpoint.catalogue.query``.
        rank: what they are ranked by, the most important first: ``"max METRIC"`` or ``"min METRIC"``; empty when the
            policy says nothing of releases.
        within_se: which candidates count as equally good as the best.
        may_promote: patterns of who may change the alias, against ``user`` and ``user on host``; empty: everybody.
        keep_last: how many former holders retention leaves alone.
    """

    select: str = ""
    rank: tuple[str, ...] = ()
    within_se: WithinSE | None = None
    may_promote: tuple[str, ...] = ()
    keep_last: int = KEEPS
    validation: ValidationPolicy = ValidationPolicy()
    improvement: Improvement | None = None
    signing: SigningPolicy | None = None
    hooks: tuple[Hook, ...] = ()


class Policy(PolicyTable, frozen=True, kw_only=True):
    """The policy of one alias; with nothing but the alias it asks nothing.

    Attributes:
        base: the directory that paths are relative to.
        digest: of the text of the file.
    """

    alias: str
    base: Path = Path()
    digest: str = ""

    def __post_init__(self) -> None:
        parse_query(self.select)
        ranking_keys(self.by)
        if self.select and not self.by:
            raise ConfigError('it selects, but does not say which is best: rank = ["max METRIC"]')
        if self.keep_last < 1:
            raise ConfigError("keep_last is at least 1: there must be something to roll back to")
        check_wanted(self.wanted)

    @property
    def by(self) -> dict[str, Mode]:
        """The metrics that candidates are ranked by, and their directions; the most important first."""
        return dict(map(_rank, self.rank))

    @property
    def wanted(self) -> ValidationSpec:
        """The checks of a validation. The golden file is looked for when it is needed."""
        entries = msgspec.structs.asdict(self.validation)
        del entries["max_age"], entries["timeout"]
        golden = None if self.validation.golden is None else str(self.base / self.validation.golden)
        return ValidationSpec(**entries | {"golden": golden})

    @property
    def max_age(self) -> timedelta:
        """The age from which on a validation does not count."""
        return MAX_AGE if self.validation.max_age is None else read_duration("max_age", self.validation.max_age)

    @property
    def timeout(self) -> float | None:
        """Seconds that a validation may take."""
        text = self.validation.timeout
        return None if text is None else read_duration("timeout", text).total_seconds()

    @property
    def public_key(self) -> Path | None:
        """The key that signatures of promoted checkpoints are made with; None asks for no signature."""
        return None if self.signing is None else self.base / self.signing.public_key

    def allows(self, actor: str) -> bool:
        """Return whether somebody, as ``provenance.present_user`` names them, may change the alias."""
        names = (actor, actor.partition(" on ")[0])
        return not self.may_promote or any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.may_promote for name in names
        )


def _rank(text: str) -> tuple[str, Mode]:
    mode, _, name = text.partition(" ")
    if not name.strip():
        raise ConfigError(f'rank has {text!r}; write "max METRIC" or "min METRIC"')
    return name.strip(), mode_of(mode)


def _positive_duration(name: str, text: str) -> None:
    if not read_duration(name, text):
        raise ConfigError(f"{name} = {text!r}: nothing is done in no time; give one such as 30s or 7d")


# --- the file -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Policies:
    """The content of ``production.toml``. A table is read when it is asked for: a mistake in another one does no harm.

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
            table = msgspec.convert(self.content[alias], PolicyTable)
            entries = {name: getattr(table, name) for name in table.__struct_fields__}
            return Policy(alias=check_alias(alias), base=self.base, digest=digest(self.text.encode()), **entries)
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
        data = store.get(layout.POLICY, max_size=SMALL)
    except NotFoundError:
        return Policies({}, "", where, base)
    return read_text(data, where=where, base=base)


def key_for(store: Store, ref: str) -> Path | None:
    """Return the public key by which the policy of an alias wants signatures; None where it wants none.

    Raises:
        ConfigError: the policy cannot be read.
    """
    parsed = parse_any(ref)
    policy = read_policies(store).of(parsed.alias) if isinstance(parsed, AliasRef) else None
    return None if policy is None else policy.public_key


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


_TABLES: dict[str, type[msgspec.Struct]] = {
    "": PolicyTable,
    "validation": ValidationPolicy,
    "improvement": Improvement,
    "signing": SigningPolicy,
    "within_se": WithinSE,
    "hooks": Hook,
}


def _explained(message: str) -> str:
    """A message of msgspec's, with near names for an entry that does not exist."""
    if "unknown field `" not in message:
        problem, _, place = message.partition(" - at `$.")
        return f"{place.strip('`')}: {problem}" if place else problem
    name = message.partition("unknown field `")[2].partition("`")[0]
    place = message.partition("at `$.")[2].strip("`").partition("[")[0]
    entries = [entry.encode_name for entry in msgspec.structs.fields(_TABLES[place])]
    of_table = f" of {place}" if place else ""
    return f"there is no entry {name!r}{did_you_mean(name, entries)}; entries{of_table}: {', '.join(entries)}"
