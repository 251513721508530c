"""Validate a checkpoint before it is deployed: what is checked, by which process, and the record of it.

The checks themselves (``peakpoint.production.checks``) need torch and run code of the user. Here they run in another
process, so that a crash there is a failed check and no crash of ours. Nothing here imports torch.

The life of a validation: ``validation_request`` refuses what cannot be, finds the checkpoint and the champion, and
holds the checkpoint as being read. ``subprocess_runner.run_apart`` starts a fresh interpreter that calls
``checks.runner.main``; that runs the checks one after the other and sends a line of JSON for each on a pipe of its own.
Before each line it marks the place in what is printed, so that output and checks stay together. ``FindingCollector``
takes the lines, and fills up what a death has left open. ``conclude`` stores predictions, then creates the record.
``pp.validate`` runs the checks in its own process.
"""

import importlib.util
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from peakpoint._version import __version__
from peakpoint.errors import ConfigError, CorruptError, FormatError, MissingExtraError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import is_number, metrics_from_json
from peakpoint.format.names import OWN_PARTS, did_you_mean, no_part
from peakpoint.production.subprocess_runner import run_apart
from peakpoint.repository import aliases, reader, validations
from peakpoint.repository.provenance import code_version, present_user, utc_now
from peakpoint.repository.refs import check_alias
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.validations import Finding, Predictions, Progress, Validation, ValidationSpec
from peakpoint.store import BucketStore, LocalStore, translated

# --- what is checked ----------------------------------------------------------------------------------------------

BUDGETS = {
    "latency_ms": "95th percentile of single forward passes, in milliseconds",
    "memory_mb": "peak growth of the memory of the process that loads and runs it, in 10^6 bytes",
    "size_mb": "the files of the part, in 10^6 bytes",
    "parameters": "how many numbers are learnt",
}

_OUTPUT = re.compile(r"[A-Z][A-Z0-9_]*\[((\*|\d+)(, ?(\*|\d+))*)?\]")


def check_names(spec: ValidationSpec) -> tuple[str, ...]:
    """The names of the checks, in their order."""
    budgets = [f"budget {name}" for name in spec.budgets] or ["budgets"]
    always = ("integrity", "finite", "sparsity", "loads", "signature", "metrics", "golden")
    return (*always, *budgets, *spec.checks)


def check_wanted(spec: ValidationSpec) -> None:
    """Refuse what can be seen to be wrong before the checkpoint is read.

    Raises:
        ConfigError: it cannot be.
    """
    for name in (spec.evaluate, spec.model, *spec.checks):
        if name is not None and not all(name.partition(":")):
            raise ConfigError(f"{name!r} names no function; write module:function, such as checks:evaluate")
    _check_budgets(spec.budgets)
    if not (is_number(spec.tolerance) and spec.tolerance >= 0):
        raise ConfigError(f"the tolerance is a number of at least 0, not {spec.tolerance!r}")
    if not (is_number(spec.agreement) and 0 <= spec.agreement <= 1):
        raise ConfigError(f"the agreement is a share from 0 to 1, not {spec.agreement!r}")
    for name, text in spec.signature.items():
        if _OUTPUT.fullmatch(text) is None:
            raise ConfigError(f"signature {name}={text!r}: write an element type and a shape, such as F32[*, 10]")
    _check_needs(spec)


def _check_budgets(budgets: Mapping[str, float]) -> None:
    for name, value in budgets.items():
        if name not in BUDGETS:
            known_budgets = "; ".join(f"{budget} ({meaning})" for budget, meaning in BUDGETS.items())
            raise ConfigError(
                f"there is no budget {name!r}{did_you_mean(name, list(BUDGETS))}; budgets: {known_budgets}"
            )
        if not (is_number(value) and value > 0):
            raise ConfigError(f"the budget {name}={value!r} is not a number above 0")


def _check_needs(spec: ValidationSpec) -> None:
    """Refuse checks that lack what they need."""
    if spec.agreement and spec.golden is None:
        raise ConfigError("agreement with the champion needs golden inputs: give them with --golden FILE")
    if spec.metrics and spec.evaluate is None:
        raise ConfigError(f"to confirm {spec.metrics[0]}, say how to evaluate it: --with MODULE:FUNCTION")
    needy = [name for name in ("golden", "signature") if getattr(spec, name)]
    needy += [f"the budget {name}" for name in spec.budgets if name in ("latency_ms", "memory_mb")]
    if needy and spec.model is None:
        raise ConfigError(f"{needy[0]} needs a model to run; name the function that makes it: --model MODULE:FUNCTION")


@dataclass(kw_only=True)
class ValidationRequest:
    """A validation that is about to be made: the checkpoint, what is checked, and the champion beside it.

    Attributes:
        manifest: of the checkpoint, with the metrics that the manifest has.
        digest: of the manifest's bytes.
        wanted: what is checked, complete.
        alias: whose holder is the champion.
        champion: its manifest; None when there is none to compare with.
        no_champion: then why, in words.
    """

    repository: Repository
    manifest: Manifest
    digest: str
    wanted: ValidationSpec
    alias: str
    champion: Manifest | None
    no_champion: str


@contextmanager
def validation_request(
    repository: Repository, ref: str, spec: ValidationSpec, alias: str
) -> Iterator[ValidationRequest]:
    """Find everything that a validation needs; rules leave the checkpoint alone until the end of the block.

    Raises:
        NotFoundError: there is no such checkpoint, part or file.
        ConfigError: the spec cannot be met.
    """
    check_wanted(spec)
    alias = check_alias(alias.removeprefix("@"))
    _, manifest = repository.locate(ref)
    hold = reader.hold_for_reading(repository.store, manifest)
    try:
        parts = [name for name in manifest.parts if name not in OWN_PARTS]
        if spec.part not in parts:
            raise no_part(spec.part, parts, where=manifest.name)
        champion, no_champion = _champion(repository, alias)
        yield ValidationRequest(
            repository=repository,
            manifest=manifest,
            digest=reader.manifest_digest(repository.store, manifest),
            wanted=with_golden(spec),
            alias=alias,
            champion=champion,
            no_champion=no_champion,
        )
    finally:
        if hold is not None:
            hold.release()


def _champion(repository: Repository, alias: str) -> tuple[Manifest | None, str]:
    """The champion's manifest, or why there is none."""
    record = aliases.newest(repository.store, alias)
    if isinstance(record, aliases.DamagedRecord):
        return None, f"{alias} cannot be read: {record.error}"
    if record is None or record.target is None:
        similar = did_you_mean(alias, aliases.names(repository.store))
        return None, f"no {alias} {'yet' if record is None else 'at present'}{similar}"
    try:
        return repository.locate(f"@{alias}")[1], ""
    except (NotFoundError, CorruptError, FormatError) as error:
        return None, f"{alias} is {record.target.ref}, which cannot be read: {error}"


def with_golden(spec: ValidationSpec) -> ValidationSpec:
    """Add the digest of the golden file as it is now: so it stands in the record.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it has changed.
    """
    if spec.golden is None:
        return spec
    path = Path(spec.golden)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path} with golden inputs (seen from {Path.cwd()})")
    with translated("read", path):
        digest = file_digest(path)
    if spec.golden_digest not in (None, digest):
        raise ConfigError(f"{path} holds other golden inputs: its BLAKE3 is {digest}, expected {spec.golden_digest}")
    return replace(spec, golden_digest=digest)


def file_digest(path: Path) -> str:
    """The BLAKE3 digest of a file, however large."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


# --- collecting ---------------------------------------------------------------------------------------------------

_TAIL = 4000  # characters of what was printed that are stored with a finding


@dataclass(slots=True)
class FindingCollector:
    """The findings of a validation so far.

    Attributes:
        request: what is validated.
        progress: called with the name of each check before it begins.
        facts: ``metrics`` as evaluated, ``predictions``, ``environment``, ``device``, ``compared`` with the champion.
        current: what is running; "" before anything has begun.
        began: when it began.
        refused: why nothing was checked and nothing is to be recorded; empty otherwise.
    """

    request: ValidationRequest
    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    current: str = ""
    began: float = field(default_factory=time.perf_counter)
    refused: str = ""

    def take(self, event: Mapping[str, Any], output: str = "") -> bool:
        """Take one event; True when it was the last.

        Args:
            event: see ``checks.runner.run_checks``.
            output: what was printed since the last finding.
        """
        match event:
            case {"begin": name}:
                self.current, self.began = name, time.perf_counter()
                self.progress(name)
            case {"refused": reason}:
                self.refused = reason
            case {"finding": finding}:
                self.findings.append(_with_output(msgspec.convert(finding, Finding), output))
            case {"facts": facts}:
                self.facts.update(facts)
        return "done" in event or "refused" in event

    def cut_short(self, end: str, output: str) -> None:
        """Fill up the findings when the process has ended in the middle of a check."""
        check, *unreached = check_names(self.request.wanted)[len(self.findings) :] or ("",)
        if not check:
            return
        seconds = round(time.perf_counter() - self.began, 6)
        evidence = {"cut_short": True}
        finding = Finding(
            check=check,
            outcome="failed",
            said=f"{end} during {self.current or check}",
            evidence=evidence,
            seconds=seconds,
        )
        self.findings.append(_with_output(finding, output))
        summary = "not reached: the process had ended before"
        self.findings += [Finding(check=name, outcome="skipped", said=summary) for name in unreached]


def _with_output(finding: Finding, output: str) -> Finding:
    if not output.strip():
        return finding
    return replace(finding, evidence={**finding.evidence, "output": output[-_TAIL:]})


def conclude(collector: FindingCollector) -> Validation:
    """Write down what was found. The record is the commit: predictions are durable before it.

    Raises:
        ConfigError: a function of the user cannot be called; nothing is recorded.
        NotFoundError: the checkpoint went meanwhile; nothing is recorded.
        StoreError: the store refused.
    """
    if collector.refused:
        raise ConfigError(collector.refused)
    request, facts = collector.request, collector.facts
    store, manifest = request.repository.store, request.manifest
    if store.size(layout.manifest_key(manifest.run, manifest.name)) is None:
        raise NotFoundError(
            f"{manifest.run}/{manifest.name} was removed while it was being validated; nothing is recorded"
        )
    predictions = None
    if "predictions" in facts:
        values = msgspec.convert(facts["predictions"], Predictions)
        predictions = validations.keep_predictions(store, manifest.run, manifest.id, values)
    compared = request.champion if "compared" in facts else None
    device = {"device": facts["device"]} if "device" in facts else {}
    return validations.record(
        store,
        Validation(
            run=manifest.run,
            checkpoint=manifest.id,
            name=manifest.name,
            number=0,
            manifest=request.digest,
            parts=tuple(manifest.parts),
            at=utc_now(),
            by=present_user(),
            wanted=request.wanted,
            findings=tuple(collector.findings),
            metrics=metrics_from_json(facts.get("metrics", {})),
            against=None if compared is None else compared.id,
            alias=None if compared is None else request.alias,
            predictions=predictions,
            environment=_environment() | facts.get("environment", {}) | device,
        ),
    )


def _environment() -> dict[str, str]:
    code = code_version(Path.cwd())
    environment = {
        "peakpoint": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
    }
    return environment if code is None else environment | {"code": code}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


# --- in another process -------------------------------------------------------------------------------------------


def encode_job(request: ValidationRequest) -> bytes:
    """Encode a request for the other process, in one line.

    Raises:
        ConfigError: the repository is only in this process.
    """
    store, champion = request.repository.store, request.champion
    if not isinstance(store, LocalStore | BucketStore):
        raise ConfigError(
            f"{store.location} cannot be reached from another process: validate in this one, with peakpoint.validate"
        )
    refs = [None if manifest is None else f"{manifest.run}/{manifest.id}" for manifest in (request.manifest, champion)]
    root = os.fspath(store.root.absolute()) if isinstance(store, LocalStore) else store.location
    return msgspec.json.encode([root, *refs, request.digest, request.wanted, request.alias, request.no_champion])


def decode_job(line: bytes) -> ValidationRequest:
    """Return the request that ``encode_job`` was given."""
    kinds = tuple[str, str, str | None, str, ValidationSpec, str, str]
    root, ref, champion, digest, wanted, alias, no_champion = msgspec.json.decode(line, type=kinds)
    repository = open_repository(root)
    return ValidationRequest(
        repository=repository,
        manifest=repository.find_manifest(ref),
        digest=digest,
        wanted=wanted,
        alias=alias,
        champion=None if champion is None else repository.find_manifest(champion),
        no_champion=no_champion,
    )


def validate(
    repository: Repository,
    ref: str,
    spec: ValidationSpec,
    *,
    alias: str = "champion",
    timeout: float | None = None,
    progress: Progress = lambda _: None,
) -> Validation:
    """Validate a checkpoint, and record what was found.

    Everything that reads weights or runs code of the user does so in another process: whatever happens to it, a crash,
    an ``exit``, a hang beyond ``timeout``, is a failed check of a validation that is recorded.

    Args:
        wanted: what to check.
        alias: the alias whose holder it is compared with.
        timeout: seconds that all checks together may take; None for no limit.
        progress: called with the name of each check before it begins.

    Returns:
        The record; ``passed`` says whether it passed.

    Raises:
        NotFoundError: no such checkpoint, part or file, or the checkpoint went meanwhile.
        ConfigError: the spec cannot be met, or the repository is only in this process.
        MissingExtraError: torch is not installed.
        StoreError: the record cannot be written.
    """
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"the timeout is a number of seconds above 0, not {timeout!r}")
    for name in ("torch", "numpy"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"a validation needs {name}, which is not installed: pip install 'peakpoint[torch]'"
            )
    with validation_request(repository, ref, spec, alias) as request:
        collector = FindingCollector(request, progress)
        _collect(collector, timeout)
        return conclude(collector)


def _collect(collector: FindingCollector, timeout: float | None) -> None:
    """Run the checks in another process."""
    printed = bytearray()

    def take_output() -> str:
        text = printed.decode(errors="replace")
        printed.clear()
        return text

    def add_output(data: bytes) -> None:
        printed.extend(data)
        del printed[: -4 * _TAIL]

    def take_line(line: bytes) -> bool:
        try:
            event = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:  # foreign code has written to a descriptor that is not its own
            add_output(line)
            return False
        return collector.take(event, take_output() if "finding" in event else "")

    job = encode_job(collector.request)
    end = run_apart("peakpoint.production.checks.runner", job, timeout=timeout, on_line=take_line, on_output=add_output)
    if end is not None:
        collector.cut_short(end, take_output())
