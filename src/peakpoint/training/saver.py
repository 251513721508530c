"""One save at a time, in a background thread: commit, then retention.

A save that fails keeps its captured state in memory until it is written again or replaced by a better one.
"""

import contextlib
import errno
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from peakpoint.errors import Error, StoreError
from peakpoint.format import layout
from peakpoint.format.amounts import UNDO_FOR, read_duration, size_text
from peakpoint.format.events import Saved, SaveFailed
from peakpoint.format.manifest import FileRecord, Manifest, without_parts
from peakpoint.repository import removal, space
from peakpoint.repository.annotations import LiveAnnotations
from peakpoint.repository.commit import commit, unused_name, withdraw
from peakpoint.repository.journal import Journal
from peakpoint.repository.run_audit import clean_run
from peakpoint.rules import Rule
from peakpoint.rules.retention import Removal, RetentionPlan
from peakpoint.state.capture import CapturedState
from peakpoint.state.host_copy import ChangedError
from peakpoint.store import Hold, Store
from peakpoint.store.threads import start_thread
from peakpoint.training.records import saved_event
from peakpoint.training.rule_changes import Rules, rule_change

RESERVE = 4 * 1024 * 1024  # bytes for manifests, journal and directories
_DEFAULT_UNDO = read_duration("undo_for", UNDO_FOR)


@dataclass(slots=True)
class SaveJob:
    """A save that is under way, or failed.

    Attributes:
        draft: the manifest but for its files.
        captured: the copy of the state.
        begun: whether the directory that ``draft`` names belongs to this save; it may hold some of its files.
        ranks: how many write to that directory; with several its name is final.
        written: see ``commit``.
    """

    draft: Manifest
    captured: CapturedState
    begun: bool = False
    ranks: int = 1
    written: Callable[[], Mapping[str, Sequence[FileRecord]]] = dict


@dataclass(frozen=True, slots=True)
class FailedSave:
    """A save that failed, with its state still in memory."""

    job: SaveJob
    error: Exception

    @property
    def lost(self) -> bool:
        """Whether no usable copy exists, so that it must not be written again."""
        return isinstance(self.error, ChangedError) or not self.job.captured.stays


class Saver:
    """Commits checkpoints of one run and applies the rules after each.

    Args:
        committed: the checkpoints that exist.
        undo_for: how long what the rules remove can be brought back; 0 frees the space at once. None means the default
            of the commands for what is removed because the rules have changed, and 0 for the rest.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        journal: Journal,
        rules: Sequence[Rule],
        committed: Sequence[Manifest],
        annotations: LiveAnnotations,
        undo_for: timedelta | None,
        hold: Hold,
    ) -> None:
        self._undo_for, self._hold = undo_for, hold
        self._dropped_by_change: frozenset[str] = frozenset()  # ids of what a change of rules removes
        self._trash_until: datetime | None = None  # the earliest end of what this saver has put into the trash
        self._newest_is_whole = False  # this process has read or written all of it
        self._applied = False  # whether the rules were, since the last save
        self._annotations = annotations
        self._store, self._run, self._journal, self._rules = store, run, journal, tuple(rules)
        self.committed = tuple(committed)
        self.last_id: str | None = None  # of the checkpoint that this saver committed last
        self._job: SaveJob | None = None
        self._thread: threading.Thread | None = None
        self._failure: FailedSave | None = None
        self._notices: list[str] = []
        self._unrecorded: list[Saved] = []  # commits that the journal does not have yet

    @property
    def known(self) -> tuple[Manifest, ...]:
        """The checkpoints that exist, the one that is being written and the one that is to be written again."""
        job, failure = self._job, self._failure  # in this order: the thread sets them in the opposite one
        job = failure.job if job is None and failure is not None else job
        removed = self._annotations.removed
        known = [manifest for manifest in self.committed if manifest.id not in removed or self._exists(manifest)]
        if job is not None and all(manifest.id != job.draft.id for manifest in known):
            known.append(job.draft)
        return tuple(self._annotations.view(known))

    def finish(self) -> None:
        """Wait until no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread, self._job = None, None

    def failure(self) -> FailedSave | None:
        """Return the failed save whose state is still in memory, once its thread has ended."""
        if self._thread is not None and self._thread.is_alive():
            return None
        self.finish()
        return self._failure

    def notices(self) -> list[str]:
        """Return, once, sentences on what happened in the background."""
        notices, self._notices = self._notices, []
        return notices

    def submit(self, job: SaveJob) -> bool:
        """Begin a save; the caller has waited for the previous one, and no failed one is in memory.

        Returns:
            False when there is no space for it: then it has failed, and nothing was written.
        """
        assert self._failure is None
        self._job = job
        if not self._has_room(job):
            if job.captured.stays:
                job.captured.copying.run()  # so that the state of this moment can be written later
            return False
        self._thread = threading.Thread(target=self._work, args=(job,), name=f"peakpoint-save-{self._run}")
        self._thread.start()
        return True

    def retry(self) -> FailedSave | None:
        """Write the state of the failed save again, in this thread.

        Returns:
            The failure, if it failed again.
        """
        failure, self._failure = self._failure, None
        assert failure is not None
        self._job = failure.job
        if self._has_room(failure.job):
            self._work(failure.job)
        self._job = None
        return self._failure

    def set_aside(self, damaged: Collection[str]) -> None:
        """Count some checkpoints as not existing: a damaged best must not keep a good one from being saved.

        They are not removed either: their remains are for people to look at.
        """
        self.committed = tuple(manifest for manifest in self.committed if manifest.id not in damaged)

    def start(self, following: Manifest, earlier: Sequence[Rules | None], *, newest_is_whole: bool) -> list[str]:
        """Work out what the changed rules will remove; nothing is removed yet.

        Args:
            following: a next checkpoint.
            earlier: the earlier rules, see ``rule_changes.earlier_rules``.
            newest_is_whole: whether every byte of the newest checkpoint has been compared with its digest.

        Returns:
            Sentences for people.
        """
        self._newest_is_whole = newest_is_whole
        if not self.committed or all(rules == (self._rules or None) for rules in earlier):
            return []
        manifests = self._annotations.view(self.committed)
        change = rule_change(manifests, following, self._rules, earlier, self._annotations.planner(self.committed))
        self._dropped_by_change = frozenset(manifest.id for manifest in change.removed)
        return change.sentences(self._store.location, _DEFAULT_UNDO if self._undo_for is None else self._undo_for)

    def catch_up(self) -> None:
        """Apply the rules if nothing was saved: an earlier process may have been killed before it did.

        Only if the newest checkpoint is known to be whole: the previous one may be the only good one.
        """
        if not self._newest_is_whole or self._applied:
            return
        try:
            self._retain()
        except StoreError as error:
            self._notices.append(f"the rules could not be applied: {error}; the next save tries again")

    def give_up(self) -> None:
        """Let go of the state of a failed save."""
        self._failure = None

    def forget(self, ids: Collection[str]) -> None:
        """Wait for the save under way, and give up a failed one of these."""
        self.finish()
        if self._failure is not None and self._failure.job.draft.id in ids:
            self.give_up()

    def remove(self, ids: Collection[str], reason: str) -> None:
        """Wait for the save under way, and remove checkpoints that are wrong, at once."""
        self.forget(ids)
        removals = [Removal(manifest, reason) for manifest in self.committed if manifest.id in ids]
        failures = removal.remove(self._store, self._journal, removals, by="loop", protected=self._protected)
        self._notices += failures.values()
        self.committed = tuple(
            manifest for manifest in self.committed if manifest.id not in ids or self._exists(manifest)
        )

    def _has_room(self, job: SaveJob) -> bool:
        free, required = self._store.free(), job.ranks * job.captured.size_bytes + RESERVE
        if free is not None and free < required and self._make_room(job, required):
            free = self._store.free()
        if free is None or free >= required:
            return True
        message = (
            f"no space for checkpoint {job.draft.name} in {self._store.location}: it needs {size_text(required)} and "
            f"{size_text(free)} are free; {space.ways_to_free_space(self._store, self._run, self.committed)}"
        )
        self._fail(job, StoreError(errno.ENOSPC, message))
        return False

    def _make_room(self, job: SaveJob, required: int | None = None) -> bool:
        """Free space until ``required`` are free: empty the trash, then remove checkpoints that no rule keeps.

        Returns:
            Whether anything was removed.
        """
        freed = []
        try:
            trashed = space.empty_trash(self._store, self._run)
            if trashed:
                freed.append(f"{trashed} in the trash")
            if self._newest_is_whole and (required is None or (self._store.free() or 0) < required):
                plan = self._retain(at_once=True)
                if plan.freed_bytes:
                    freed.append(f"{len(plan.remove) or 'parts'} that no rule keeps")
        except StoreError as error:
            self._notices.append(f"no space could be freed for {job.draft.name}: {error}")
        if freed:
            self._notices.append(
                f"the disk is full: to make space for {job.draft.name}, checkpoints were permanently deleted: "
                f"{' and '.join(freed)}"
            )
        return bool(freed)

    def _work(self, job: SaveJob) -> None:
        try:
            try:
                self._copy_and_commit(job)
            except StoreError as error:
                if not (error.is_full and job.captured.stays and self._make_room(job)):
                    raise
                self._copy_and_commit(job)
        except Exception as error:  # noqa: BLE001 - the end of a thread: whatever it was, the next call raises it
            self._fail(job, error)

    def _copy_and_commit(self, job: SaveJob) -> None:
        copier = start_thread(job.captured.copying.run, f"peakpoint-copy-{self._run}")
        try:
            if copier is None:
                job.captured.copying.run()
            self._commit(job)
        except BaseException:
            job.captured.copying.abandon()
            with contextlib.suppress(Error):
                job.written()
            raise
        finally:
            if copier is not None:
                copier.join()

    def _fail(self, job: SaveJob, error: Exception) -> None:
        self._failure, self._job = FailedSave(job, error), None
        draft = job.draft
        event = SaveFailed(
            at=self._journal.now(), checkpoint=draft.id, name=draft.name, reasons=draft.reasons, error=str(error)
        )
        try:
            self._journal.append(event)
        except StoreError as journal_error:  # a full disk refuses the record of it, too
            self._notices.append(f"the failed save could not be recorded in the journal either: {journal_error}")

    def _commit(self, job: SaveJob) -> None:
        if job.begun:  # the same directory again, which must not hold files of two attempts
            withdraw(self._store, job.draft)
        elif job.ranks == 1:
            job.draft = replace(job.draft, name=unused_name(self._store, self._run, job.draft.name))
            job.begun = True
        manifest = commit(
            self._store,
            job.draft,
            job.captured.images,
            first=lambda: self._settled(job),
            previous=self.committed[-1] if self.committed else None,
            written=job.written,
            timing=lambda: {"step_waited_seconds": job.captured.copying.waited_seconds},
        )
        self._notices += self._store.remarks()
        self._newest_is_whole, self._applied = True, False
        # the name was free: a checkpoint that had it has been removed
        self.committed = (*(old for old in self.committed if old.name != manifest.name), manifest)
        self.last_id = manifest.id
        job.captured.committed(manifest)
        self._unrecorded.append(saved_event(manifest, self._journal.now()))
        try:
            self.record()
            self._retain()
        except StoreError as error:  # the checkpoint is saved, and must not be written again
            self._notices.append(
                f"{manifest.name} is saved, but the journal could not be written or the rules applied: {error}; the "
                "next save tries again"
            )
            with contextlib.suppress(StoreError):
                self.committed = tuple(filter(self._exists, self.committed))

    def _settled(self, job: SaveJob) -> None:
        """Ensure before the manifest: the copy is complete and right, the journal durable, the run still held."""
        job.captured.copying.settle()
        self._journal.sync()
        self._hold.check()

    def record(self) -> None:
        """Write saves to the journal that it does not have yet.

        Raises:
            StoreError: the journal refuses.
        """
        while self._unrecorded:
            self._journal.append(self._unrecorded[0])
            self._unrecorded.pop(0)

    def _retain(self, *, at_once: bool = False) -> RetentionPlan:
        """Apply the rules to what exists; a checkpoint that another process has removed is forgotten.

        Returns:
            The plan that was carried out; with ``at_once`` nothing can be brought back.
        """
        existing = [manifest for manifest in self.committed if self._exists(manifest)]
        plan = self._annotations.planner(existing)(existing, self._rules)
        now = self._journal.now()
        failures: dict[str, str] = {}
        for removals, until in self._removals(plan, now, at_once=at_once):
            failures |= removal.remove(
                self._store, self._journal, removals, by="rules", protected=self._protected, until=until
            )
        dropped = {drop.manifest.id: drop.parts for drop in plan.drop if drop.manifest.id not in failures}
        if (self._undo_for and not at_once) or (self._trash_until is not None and self._trash_until <= now):
            self._trash_until = None
            try:
                clean_run(self._store, self._run, now)  # nothing else writes to this run
            except StoreError as error:
                self._notices.append(f"the trash of run {self._run!r} could not be emptied: {error}")
        self._notices += failures.values()
        self.committed = tuple(
            without_parts(manifest, dropped[manifest.id]) if manifest.id in dropped else manifest
            for manifest in existing
            if manifest.id in plan.keep or (failures and self._exists(manifest))
        )
        self._applied = True
        return plan

    def _removals(
        self, plan: RetentionPlan, now: datetime, *, at_once: bool
    ) -> Iterator[tuple[Sequence[Removal], datetime | None]]:
        """Yield what a plan removes, with the time until which it can be brought back."""
        undo_for = timedelta() if at_once else self._undo_for
        if undo_for is not None:
            yield plan.remove, now + undo_for if undo_for else None
        else:
            by_change = [removal for removal in plan.remove if removal.manifest.id in self._dropped_by_change]
            if by_change:
                self._trash_until = now + _DEFAULT_UNDO
                yield by_change, self._trash_until
            yield [removal for removal in plan.remove if removal not in by_change], None
        yield plan.drop, None

    def _protected(self) -> Mapping[str, str]:
        """Return the checkpoints that pins and aliases protect by now, with the reasons."""
        self._annotations.refresh()
        return {**self._annotations.pinned, **self._annotations.aliased(self.committed)}

    def _exists(self, manifest: Manifest) -> bool:
        return self._store.size(layout.manifest_key(manifest.run, manifest.name)) is not None
