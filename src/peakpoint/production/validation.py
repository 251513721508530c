"""Validation of a checkpoint before it is deployed: what is asked, by whom it is examined, and the record of it.

The examination itself (``peakpoint.production.checks``) needs torch and runs code of the user. Here it runs in a
process apart, so that a crash of it is a failed check and no crash of ours. Nothing here imports torch.

The life of a validation: ``ask`` refuses what cannot be, finds the checkpoint and the champion, and holds the
checkpoint as being read. ``subprocess_runner.run_apart`` starts a fresh interpreter that calls ``checks.child.main``;
``checks.runner.examine`` makes the checks one after the other and says a line of JSON for each on a pipe of its own.
Before each line it marks the place in what is printed, so that output and checks stay together. ``Collected`` takes the
lines, and fills up what a death has left open. ``conclude`` keeps predictions, then creates the record. ``pp.validate``
makes the checks in its own process.
"""

import importlib.util
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from peakpoint._version import __version__
from peakpoint.errors import ConfigError, CorruptError, FormatError, MissingExtraError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_from_json
from peakpoint.format.names import did_you_mean, no_part
from peakpoint.production.subprocess_runner import run_apart
from peakpoint.repository import aliases, reader, validations
from peakpoint.repository.provenance import code_version, present_user, utc_now
from peakpoint.repository.refs import check_alias
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import Finding, Predictions, Progress, Validation, ValidationSpec
from peakpoint.store import Hold, LocalStore, translated

# --- what is asked -----------------------------------------------------------------------------------------------

BUDGETS = {
    "latency_ms": "95th percentile of single forward passes, in milliseconds",
    "memory_mb": "peak growth of the memory of the process that loads and runs it, in 10^6 bytes",
    "size_mb": "the files of the part, in 10^6 bytes",
    "parameters": "how many numbers are learnt",
}

_OUTPUT = re.compile(r"[A-Z][A-Z0-9_]*\[((\*|\d+)(, ?(\*|\d+))*)?\]")


def order(wanted: ValidationSpec) -> tuple[str, ...]:
    """The names of the checks, in their order."""
    budgets = [f"budget {name}" for name in wanted.budgets] or ["budgets"]
    always = ("integrity", "finite", "sparsity", "loads", "signature", "metrics", "golden")
    return (*always, *budgets, *wanted.checks)


def check_wanted(wanted: ValidationSpec) -> None:
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
            raise ConfigError(f"there is no budget {name!r}{did_you_mean(name, list(BUDGETS))}; budgets: {have}")
        if not (_is_number(value) and value > 0):
            raise ConfigError(f"the budget {name}={value!r} is no number above 0")


def _check_means(wanted: ValidationSpec) -> None:
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
    wanted: ValidationSpec
    alias: str
    champion: Manifest | None
    without: str
    hold: Hold | None

    def release(self) -> None:
        """Let rules have the checkpoint again."""
        if self.hold is not None:
            self.hold.release()


def ask(repository: Repository, ref: str, wanted: ValidationSpec, alias: str) -> Asked:
    """Find everything that a validation needs, before the first check.

    Raises:
        NotFoundError: there is no such checkpoint, part or file.
        ConfigError: what is wanted cannot be.
    """
    check_wanted(wanted)
    alias = check_alias(alias.removeprefix("@"))
    _, manifest = repository.locate(ref)
    hold = reader.hold_for_reading(repository.store, manifest)
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
        raise no_part(part, have, where=manifest.name)


def _champion(repository: Repository, alias: str) -> tuple[Manifest | None, str]:
    record = aliases.newest(repository.store, alias)
    if isinstance(record, aliases.DamagedRecord):
        return None, f"what {alias} is cannot be read: {record.error}"
    if record is None or record.target is None:
        there = did_you_mean(alias, aliases.names(repository.store))
        return None, f"nothing is {alias} {'yet' if record is None else 'at present'}{there}"
    try:
        return repository.locate(f"@{alias}")[1], ""
    except (NotFoundError, CorruptError, FormatError) as error:
        return None, f"{alias} is {record.target.ref}, which cannot be read: {error}"


def with_golden(wanted: ValidationSpec) -> ValidationSpec:
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


# --- the examination in a process apart ---------------------------------------------------------------------------

_TAIL = 4000  # characters of what was printed that are kept with a finding
_EXAMINER = "peakpoint.production.checks.child"


# --- collecting ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Collected:
    """What an examination has said so far.

    Attributes:
        asked: what is examined.
        progress: called with the name of each check before it begins.
        findings: of the checks that are over.
        metrics: as evaluated.
        predictions: of the evaluation, or on golden inputs.
        compared: whether the champion's outputs were compared with.
        environment: what it ran on.
        began: when the present check began.
    """

    asked: Asked
    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    predictions: Predictions | None = None
    compared: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def take(self, event: Mapping[str, Any], output: str = "") -> bool:
        """Take the next thing that is said into account; True when it was the last.

        Args:
            event: what is said.
            output: what was printed since the last finding.
        """
        match event:
            case {"begin": name}:
                self.began = time.perf_counter()
                self.progress(name)
            case {"finding": found}:
                finding = msgspec.convert(found, Finding)
                self.findings.append(_with_output(finding, output))
            case {"metrics": metrics}:
                self.metrics = metrics_from_json(metrics)
            case {"predicted": predicted, "labels": labels, "examples": examples}:
                self.predictions = Predictions(predicted, labels, examples)
            case {"environment": found}:
                self.environment.update(found)
            case {"compared": _}:
                self.compared = True
            case _:
                return "done" in event
        return False

    def cut_short(self, how: str, output: str) -> None:
        """The examination has ended in the middle of a check."""
        left = order(self.asked.wanted)[len(self.findings) :]
        for number, name in enumerate(left):
            if number:
                found = Finding(check=name, outcome="skipped", said="not reached: the process had ended before")
            else:
                seconds = time.perf_counter() - self.began
                found = Finding(
                    check=name,
                    outcome="failed",
                    said=f"{how} during {name}",
                    evidence={"cut_short": True},
                    seconds=round(seconds, 6),
                )
                found = _with_output(found, output)
            self.findings.append(found)


def _with_output(finding: Finding, output: str) -> Finding:
    if not output.strip():
        return finding
    return replace(finding, evidence={**finding.evidence, "output": output[-_TAIL:]})


def conclude(collected: Collected) -> Validation:
    """Write down what was found. The record is the commit: predictions are durable before it.

    Raises:
        NotFoundError: the checkpoint went meanwhile; nothing is recorded.
        StoreError: the store refused.
    """
    asked = collected.asked
    store, manifest = asked.repository.store, asked.manifest
    if store.size(layout.manifest_key(manifest.run, manifest.name)) is None:
        raise NotFoundError(
            f"{manifest.run}/{manifest.name} was removed while it was being validated; nothing is recorded"
        )
    kept = None
    if collected.predictions is not None:
        kept = validations.keep_predictions(store, manifest.run, manifest.id, collected.predictions)
    compared = asked.champion if collected.compared else None
    return validations.record(
        store,
        Validation(
            run=manifest.run,
            checkpoint=manifest.id,
            name=manifest.name,
            number=0,
            manifest=asked.digest,
            parts=tuple(manifest.parts),
            at=utc_now(),
            by=present_user(),
            wanted=asked.wanted,
            findings=tuple(collected.findings),
            metrics=collected.metrics,
            against=None if compared is None else compared.id,
            alias=None if compared is None else asked.alias,
            predictions=kept,
            environment=_environment() | collected.environment,
        ),
    )


def _environment() -> dict[str, str]:
    code = code_version(Path.cwd())
    found = {
        "peakpoint": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
    }
    return found if code is None else found | {"code": code}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


# --- in a process apart -------------------------------------------------------------------------------------------


def validate(
    repository: Repository,
    ref: str,
    wanted: ValidationSpec,
    *,
    alias: str = "champion",
    timeout: float | None = None,
    progress: Progress = lambda _: None,
) -> Validation:
    """Validate a checkpoint, and record what was found.

    Everything that reads weights or runs code of the user does so in a process apart: whatever happens to it, a crash,
    an ``exit``, a hang beyond ``timeout``, is a failed check of a validation that is recorded.

    Args:
        repository: where.
        ref: which checkpoint.
        wanted: what to check.
        alias: the alias whose holder it is compared with.
        timeout: seconds that all checks together may take; None when they may take for ever.
        progress: called with the name of each check before it begins.

    Returns:
        The record; ``passed`` says whether it passed.

    Raises:
        NotFoundError: no such checkpoint, part or file, or the checkpoint went meanwhile.
        ConfigError: what is wanted cannot be, or the repository is only in this process.
        MissingExtraError: torch is not installed.
        StoreError: the record cannot be written.
    """
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"timeout={timeout!r} is no number of seconds above 0")
    for name in ("torch", "numpy"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"a validation needs {name}, which is not installed: pip install 'peakpoint[torch]'"
            )
    asked = ask(repository, ref, wanted, alias)
    try:
        collected = Collected(asked, progress)
        printed = bytearray()

        def output() -> str:
            text = printed.decode(errors="replace")
            printed.clear()
            return text

        def keep(data: bytes) -> None:
            printed.extend(data)
            del printed[: -4 * _TAIL]

        def take(line: bytes) -> bool:
            try:
                event = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:  # foreign code has written to a descriptor that is not its own
                keep(line)
                return False
            return collected.take(event, output() if "finding" in event else "")

        how = run_apart(_EXAMINER, _job(asked), timeout=timeout, said=take, printed=keep)
        if how is not None:
            collected.cut_short(how, output())
        return conclude(collected)
    finally:
        asked.release()


def _job(asked: Asked) -> bytes:
    store = asked.repository.store
    if not isinstance(store, LocalStore):
        raise ConfigError(
            f"{store.location} cannot be reached from another process: validate in this one, with peakpoint.validate"
        )
    return msgspec.json.encode(
        {
            "root": os.fspath(store.root.absolute()),
            "ref": f"{asked.manifest.run}/{asked.manifest.id}",
            "wanted": asdict(asked.wanted),
            "alias": asked.alias,
            "champion": None if asked.champion is None else f"{asked.champion.run}/{asked.champion.id}",
            "without": asked.without,
        }
    )
