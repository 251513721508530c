"""What a validation is asked: refused where it cannot be, completed, and with all that it needs at hand."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from peakpoint.errors import ConfigError, CorruptError, FormatError, NotFoundError
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import near
from peakpoint.repository import aliases, reader
from peakpoint.repository.refs import check_alias
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import Wanted
from peakpoint.store import Hold, translated

BUDGETS = {
    "latency_ms": "95th percentile of single forward passes, in milliseconds",
    "memory_mb": "peak growth of the memory of the process that loads and runs it, in 10^6 bytes",
    "size_mb": "the files of the part, in 10^6 bytes",
    "parameters": "how many numbers are learnt",
}
_OUTPUT = re.compile(r"[A-Z][A-Z0-9_]*\[((\*|\d+)(, ?(\*|\d+))*)?\]")


def order(wanted: Wanted) -> tuple[str, ...]:
    """The names of the checks, in their order."""
    budgets = [f"budget {name}" for name in wanted.budgets] or ["budgets"]
    always = ("integrity", "finite", "sparsity", "loads", "signature", "metrics", "golden")
    return (*always, *budgets, *wanted.checks)


def check_wanted(wanted: Wanted) -> None:
    """Refuse what can be seen to be wrong before anything is looked at.

    Raises:
        ConfigError: it cannot be.
    """
    for spec in (wanted.evaluate, wanted.model, *wanted.checks):
        if spec is not None and not all(spec.partition(":")):
            raise ConfigError(f"{spec!r} names no function; write module:function, such as checks:evaluate")
    _check_budgets(wanted.budgets)
    if not (_is_number(wanted.tolerance) and wanted.tolerance >= 0):
        raise ConfigError(f"tolerance={wanted.tolerance!r} is no number of at least 0")
    if not (_is_number(wanted.agreement) and 0 <= wanted.agreement <= 1):
        raise ConfigError(f"agreement={wanted.agreement!r} is no share from 0 to 1")
    for name, text in wanted.signature.items():
        if _OUTPUT.fullmatch(text) is None:
            raise ConfigError(f"the signature {name}={text!r} is none: write an element type and a shape, F32[*, 10]")
    _check_means(wanted)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_budgets(budgets: Mapping[str, float]) -> None:
    for name, value in budgets.items():
        if name not in BUDGETS:
            have = "; ".join(f"{name} ({what})" for name, what in BUDGETS.items())
            raise ConfigError(f"there is no budget {name!r}{near(name, list(BUDGETS))}; budgets: {have}")
        if not (_is_number(value) and value > 0):
            raise ConfigError(f"the budget {name}={value!r} is no number above 0")


def _check_means(wanted: Wanted) -> None:
    """Whether all that is asked for could be seen at all."""
    if wanted.agreement and wanted.golden is None:
        raise ConfigError("an agreement with the champion is seen on golden inputs: give them with --golden FILE")
    if wanted.metrics and wanted.evaluate is None:
        raise ConfigError(f"{wanted.metrics[0]} is confirmed by evaluating: say how with --with MODULE:FUNCTION")
    for what in ("golden", "signature"):
        if getattr(wanted, what) and wanted.model is None:
            raise ConfigError(f"{what}: needs a model that is run; say what makes it, --model MODULE:FUNCTION")


@dataclass(slots=True, kw_only=True)
class Asked:
    """A validation that is about to be made.

    Attributes:
        repository: where.
        manifest: of the checkpoint, with the metrics that the manifest has.
        digest: of the manifest's bytes.
        wanted: what is asked, complete.
        alias: whose holder is the champion.
        champion: its manifest; None when there is none to compare with.
        without: then why, in words.
        hold: keeps rules away from the checkpoint.
    """

    repository: Repository
    manifest: Manifest
    digest: str
    wanted: Wanted
    alias: str
    champion: Manifest | None
    without: str
    hold: Hold | None

    def release(self) -> None:
        """Let rules have the checkpoint again."""
        if self.hold is not None:
            self.hold.release()


def ask(repository: Repository, ref: str, wanted: Wanted, alias: str) -> Asked:
    """Find everything that a validation needs, before the first check.

    Raises:
        NotFoundError: there is no such checkpoint, part or file.
        ConfigError: what is wanted cannot be.
    """
    check_wanted(wanted)
    alias = check_alias(alias.removeprefix("@"))
    _, manifest = repository.locate(ref)
    hold = reader.reading(repository.store, manifest)
    try:
        _check_part(manifest, wanted.part)
        champion, without = _champion(repository, alias)
        return Asked(
            repository=repository,
            manifest=manifest,
            digest=reader.manifest_digest(repository.store, manifest),
            wanted=with_golden(wanted),
            alias=alias,
            champion=champion,
            without=without,
            hold=hold,
        )
    except BaseException:
        if hold is not None:
            hold.release()
        raise


def _check_part(manifest: Manifest, part: str) -> None:
    have = [name for name in manifest.parts if name not in ("rng", "loop")]
    if part not in have:
        raise NotFoundError(
            f"checkpoint {manifest.name} has no part {part!r}{near(part, have)}; parts: "
            f"{', '.join(have) or 'none'}; choose one with --part"
        )


def _champion(repository: Repository, alias: str) -> tuple[Manifest | None, str]:
    record = aliases.tip(repository.store, alias)
    if isinstance(record, aliases.Broken):
        return None, f"what {alias} is cannot be read: {record.error}"
    if record is None or record.target is None:
        there = near(alias, aliases.names(repository.store))
        return None, f"nothing is {alias} {'yet' if record is None else 'at present'}{there}"
    try:
        return repository.locate(f"@{alias}")[1], ""
    except (NotFoundError, CorruptError, FormatError) as error:
        return None, f"{alias} is {record.target.ref}, which cannot be read: {error}"


def with_golden(wanted: Wanted) -> Wanted:
    """What is asked, with the digest of the golden inputs as they are now: so it stands in the record.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it holds others than were asked for.
    """
    if wanted.golden is None:
        return wanted
    path = Path(wanted.golden)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path} with golden inputs (seen from {Path.cwd()})")
    with translated("read", path):
        found = file_digest(path)
    if wanted.golden_digest not in (None, found):
        raise ConfigError(
            f"{path} holds other golden inputs than were asked for: its BLAKE3 is {found}, not {wanted.golden_digest}"
        )
    return replace(wanted, golden_digest=found)


def file_digest(path: Path) -> str:
    """The BLAKE3 digest of a file, however large."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
