"""Notify commands and addresses that a policy names of a change of an alias.

A hook is notified of a change at least once, unless another change has overtaken it. When all hooks have accepted it,
that is written down beside its record; until then they can be notified again. A hook recognises a repeated change by
its ``digest``, and an older one by its ``record``, a smaller number.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from peakpoint.errors import ConflictError
from peakpoint.format import layout
from peakpoint.format.sealed import FORMAT, seal
from peakpoint.production.policy import Hook, Policy
from peakpoint.production.subprocess_runner import kill
from peakpoint.repository.aliases import AliasRecord, numbers
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.store import LocalStore, Store, establish

_HTTP_POST = str(Path(__file__).with_name("http_post.py"))
_OUTPUT_SHOWN = 500  # characters of what a hook has printed
_POLL = 0.05  # seconds between looks at how much it has printed
_MOST_OUTPUT = 1 << 20  # bytes on the disk


@dataclass(frozen=True, slots=True)
class HookResult:
    """The result of notifying one hook.

    Attributes:
        hook: the command or the address.
        error: why it failed; None when it did not.
    """

    hook: str
    error: str | None


def change_of(store: Store, record: AliasRecord) -> dict[str, Any]:
    """The change as a hook gets it: plain JSON."""
    return {
        "repository": str(store.root.absolute()) if isinstance(store, LocalStore) else store.location,
        "alias": record.alias,
        "record": record.number,
        "digest": record.digest,
        "kind": record.kind,
        **{name: getattr(record.target, name, None) for name in ("ref", "run", "checkpoint", "name")},
        **{name: getattr(record, name) for name in ("at", "by", "why", "forced")},
    }


def are_due(store: Store, record: AliasRecord, policy: Policy | None) -> bool:
    """Return whether hooks have still to be notified of a change."""
    return bool(policy and policy.hooks) and store.size(_key(record)) is None


def tell(
    store: Store,
    record: AliasRecord,
    policy: Policy | None,
    *,
    progress: Callable[[str], None] = lambda _: None,
    clock: Clock = utc_now,
) -> list[HookResult]:
    """Notify every hook of a policy of a change, unless all of them have accepted it already.

    Args:
        record: the change.
        progress: called with each hook before it is notified.

    Returns:
        A result for each hook that was notified.
    """
    if policy is None or not are_due(store, record, policy):
        return []
    change = msgspec.json.encode(change_of(store, record))
    results: list[HookResult] = []
    for hook in policy.hooks:
        progress(hook.label)
        if numbers(store, record.alias)[-1] != record.number:
            return results  # the last change that a hook gets is the one that counts
        results.append(HookResult(hook.label, _run(hook, change, policy)))
    if all(result.error is None for result in results):
        note = {"format": FORMAT, "record": record.digest, "hooks": [result.hook for result in results], "at": clock()}
        with contextlib.suppress(ConflictError):  # somebody else has notified them, too
            establish(store, _key(record), seal(note))
    return results


def _key(record: AliasRecord) -> str:
    return layout.told_key(record.alias, record.number)


def _run(hook: Hook, change: bytes, policy: Policy) -> str | None:
    """Run a command. Files take the place of pipes: what a hook leaves running may hold them open."""
    command = hook.command or (sys.executable, "-P", _HTTP_POST, hook.url, str(hook.seconds))
    try:
        with tempfile.TemporaryFile() as standard_input, tempfile.TemporaryFile() as output:
            standard_input.write(change)
            standard_input.seek(0)
            process = subprocess.Popen(  # noqa: S603 - the user's own command, from the user's own file, without a shell
                command,
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
            if code == 0:
                return None
            text = _last_words(output.fileno())
            if hook.url and text:
                return text
            return f"it ended with {code}: {text}" if text else f"it ended with {code}"
    except OSError as error:
        return f"it cannot be run: {error.strerror or error}"


def _exit_code(process: subprocess.Popen[bytes], output: int, timeout: float) -> int:
    """Wait for the end of a hook, and stop it when its time is over.

    Raises:
        TimeoutExpired: it was stopped.
    """
    deadline = time.monotonic() + timeout
    try:
        while True:
            remaining = deadline - time.monotonic()
            try:
                return process.wait(max(0.0, min(_POLL, remaining)))
            except subprocess.TimeoutExpired:
                if remaining <= 0:
                    raise
            if os.fstat(output).st_blocks * 512 > _MOST_OUTPUT:
                os.ftruncate(output, 0)  # it prints on behind a hole: one that prints without end fills no disk
    except BaseException:
        kill(process)
        raise


def _last_words(output: int) -> str:
    size = os.fstat(output).st_size
    end = os.pread(output, 4 * _OUTPUT_SHOWN, max(0, size - 4 * _OUTPUT_SHOWN))
    return end.replace(b"\0", b"").decode(errors="replace").strip()[-_OUTPUT_SHOWN:]
