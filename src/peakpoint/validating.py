"""Validation of a checkpoint before it is deployed: what is asked, by whom it is examined, and the record of it.

The examination itself (``peakpoint.examining``) needs torch and runs code of the user. Here it runs in a process apart,
so that a crash of it is a failed check and no crash of ours. Nothing here imports torch.
"""

import importlib.util
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from peakpoint._version import __version__
from peakpoint.apart import run_apart
from peakpoint.asking import Asked, ask, order
from peakpoint.errors import ConfigError, MissingExtraError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.metrics import metrics_from_json
from peakpoint.repository import validations
from peakpoint.repository.provenance import code_version, present_user, utc_now
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import Finding, Predictions, Progress, Validation, Wanted
from peakpoint.store import LocalStore

_TAIL = 4000  # characters of what was printed that are kept with a finding
_EXAMINER = "peakpoint.examining.child"


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
    wanted: Wanted,
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
