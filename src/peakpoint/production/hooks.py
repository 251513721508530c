"""Telling others that an alias has changed: commands and addresses that a policy names.

A change is told at least once, unless another one has overtaken it: that it was is written down beside its record when
every hook has taken it, and until then it can be told again. A hook knows a change again by its ``digest``, and an
older one by its ``record``, a smaller number.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from peakpoint.errors import ConflictError, Error
from peakpoint.format import layout
from peakpoint.format.sealed import FORMAT, seal
from peakpoint.production.policy import Hook, Policy
from peakpoint.production.subprocess_runner import kill, run_apart
from peakpoint.repository.aliases import AliasRecord, numbers
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.store import LocalStore, Store, establish

_TOLD = 500  # characters of what a hook has said
_TURN = 0.05  # seconds between looks at how much it has printed
_MOST_OUTPUT = 1 << 20  # bytes on the disk


@dataclass(frozen=True, slots=True)
class HookResult:
    """What became of telling one hook.

    Attributes:
        hook: the command or the address.
        error: why it did not take it; None when it did.
    """

    hook: str
    error: str | None


def change_of(store: Store, record: AliasRecord) -> dict[str, Any]:
    """What a hook is told: plain JSON."""
    target = record.target
    return {
        "repository": str(store.root.absolute()) if isinstance(store, LocalStore) else store.location,
        "alias": record.alias,
        "record": record.number,
        "digest": record.digest,
        "kind": record.kind,
        "ref": None if target is None else target.ref,
        "run": None if target is None else target.run,
        "checkpoint": None if target is None else target.checkpoint,
        "name": None if target is None else target.name,
        "at": record.at,
        "by": record.by,
        "why": record.why,
        "forced": record.forced,
    }


def are_due(store: Store, record: AliasRecord, policy: Policy | None) -> bool:
    """Whether a change has still to be told."""
    return bool(policy and policy.hooks) and store.size(_key(record)) is None


def tell(
    store: Store,
    record: AliasRecord,
    policy: Policy | None,
    *,
    progress: Callable[[str], None] = lambda _: None,
    clock: Clock = utc_now,
) -> list[HookResult]:
    """Tell every hook of a policy of a change, unless all of them have taken it already.

    Args:
        store: where the alias is.
        record: the change.
        policy: of the alias.
        progress: called with each hook before it is told.
        clock: tells the time.

    Returns:
        One for each hook; empty when there was nobody to tell.
    """
    if policy is None or not are_due(store, record, policy):
        return []
    change = msgspec.json.encode(change_of(store, record))
    told: list[HookResult] = []
    for hook in policy.hooks:
        progress(hook.label)
        if numbers(store, record.alias)[-1] != record.number:
            return told  # what a hook is told last is what counts
        told.append(HookResult(hook.label, _run(hook, change, policy) if hook.command else _post(hook, change)))
    if all(one.error is None for one in told):
        _note(store, record, [one.hook for one in told], clock)
    return told


def _key(record: AliasRecord) -> str:
    return layout.told_key(record.alias, record.number)


def _note(store: Store, record: AliasRecord, hooks: Sequence[str], clock: Clock) -> None:
    try:
        told = {"format": FORMAT, "record": record.digest, "hooks": hooks, "at": clock()}
        establish(store, _key(record), seal(told))
    except ConflictError:
        return  # somebody else has told them, too


def _run(hook: Hook, change: bytes, policy: Policy) -> str | None:
    """Files take the place of pipes: what a hook leaves running may hold them open."""
    try:
        with tempfile.TemporaryFile() as standard_input, tempfile.TemporaryFile() as output:
            standard_input.write(change)
            standard_input.seek(0)
            process = subprocess.Popen(  # noqa: S603 - the user's own command, from the user's own file, without a shell
                hook.command,
                stdin=standard_input,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=policy.base,
                start_new_session=True,
            )
            try:
                code = _exit_code(process, output.fileno(), hook.seconds)
            except subprocess.TimeoutExpired:
                return f"it took longer than {hook.seconds:g} s and was stopped"
            return None if code == 0 else f"it ended with {code}{_last_words(output.fileno())}"
    except OSError as error:
        return f"it cannot be run: {error.strerror or error}"


def _exit_code(process: subprocess.Popen[bytes], output: int, timeout: float) -> int:
    """Wait for the end of a hook, and stop it when its time is over.

    Raises:
        TimeoutExpired: it was stopped.
    """
    until = time.monotonic() + timeout
    try:
        while True:
            left = until - time.monotonic()
            try:
                return process.wait(max(0.0, min(_TURN, left)))
            except subprocess.TimeoutExpired:
                if left <= 0:
                    raise
            if os.fstat(output).st_blocks * 512 > _MOST_OUTPUT:
                os.ftruncate(output, 0)  # it prints on behind a hole: one that prints without end fills no disk
    except BaseException:
        kill(process)
        raise


def _last_words(output: int) -> str:
    size = os.fstat(output).st_size
    end = os.pread(output, 4 * _TOLD, max(0, size - 4 * _TOLD))
    text = end.replace(b"\0", b"").decode(errors="replace").strip()[-_TOLD:]
    return f": {text}" if text else ""


def _post(hook: Hook, change: bytes) -> str | None:
    """A process apart: nothing else ends a look-up of a name, or a server that answers a byte now and then, in time."""
    answers: list[str | None] = []

    def said(line: bytes) -> bool:
        answers.append(msgspec.json.decode(line, type=str | None))
        return True

    job = msgspec.json.encode({"url": hook.url, "body": change.decode()})
    try:
        ended = run_apart(
            "peakpoint.production.http_post", job, timeout=hook.seconds, said=said, printed=lambda _: None
        )
    except Error as error:
        return f"it cannot be reached: {error}"
    return answers[0] if answers else ended
