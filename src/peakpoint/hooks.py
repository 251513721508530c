"""Telling others that an alias has changed: commands and addresses that a policy names.

A change is told at least once, unless another one has overtaken it: that it was is written down beside its record when
every hook has taken it, and until then it can be told again. A hook knows a change again by its ``digest``, and an
older one by its ``record``, a smaller number.
"""

import http.client
import os
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from peakpoint import layout
from peakpoint.aliases import AliasRecord, numbers
from peakpoint.clock import Clock, utc_now
from peakpoint.errors import ConflictError
from peakpoint.manifest import FORMAT
from peakpoint.policy import Hook, Policy
from peakpoint.seal import seal
from peakpoint.store import LocalStore, Store

_TOLD = 500  # characters of what a hook has said


@dataclass(frozen=True, slots=True)
class Told:
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
) -> list[Told]:
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
    told: list[Told] = []
    for hook in policy.hooks:
        progress(hook.said)
        if numbers(store, record.alias)[-1] != record.number:
            return told  # what a hook is told last is what counts
        told.append(Told(hook.said, _run(hook, change, policy) if hook.command else _post(hook, change)))
    if all(one.error is None for one in told):
        _note(store, record, [one.hook for one in told], clock)
    return told


def _key(record: AliasRecord) -> str:
    return layout.told_key(record.alias, record.number)


def _note(store: Store, record: AliasRecord, hooks: Sequence[str], clock: Clock) -> None:
    try:
        store.create(_key(record), seal({"format": FORMAT, "record": record.digest, "hooks": hooks, "at": clock()}))
    except ConflictError:
        return  # somebody else has told them, too


def _run(hook: Hook, change: bytes, policy: Policy) -> str | None:
    """Files take the place of pipes: what a hook leaves running may hold them open."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(change)
        given.seek(0)
        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own command, from the user's own file, without a shell
                hook.command,
                stdin=given,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=policy.base,
                start_new_session=True,
            )
        except OSError as error:
            return f"it cannot be run: {error.strerror or error}"
        try:
            code = process.wait(hook.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"it took longer than {hook.timeout:g} s and was stopped"
        if code == 0:
            return None
        said.seek(max(0, said.seek(0, os.SEEK_END) - 4 * _TOLD))
        text = said.read().decode(errors="replace").strip()[-_TOLD:]
        return f"it ended with {code}" + (f": {text}" if text else "")


class _Straight(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: what comes of it is a GET, which leaves behind what is to be told."""

    def redirect_request(self, *_: object) -> None:
        """None: the answer that redirects is an error."""


def _post(hook: Hook, change: bytes) -> str | None:
    request = urllib.request.Request(  # noqa: S310 - the policy takes http and https only
        hook.url, data=change, headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.build_opener(_Straight).open(request, timeout=hook.timeout):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"it answered {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # no connection, a reset, a timeout, an address that is none, an answer that is no HTTP
        return f"it cannot be reached: {getattr(error, 'reason', None) or error}"
