"""The writer of a run for all ranks of a training: rank 0 has it, and the others follow."""

import contextlib
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peakpoint.errors import ConflictError, CorruptError, Error, FormatError, NotFoundError, SaveFailedError, StoreError
from peakpoint.format.manifest import Manifest
from peakpoint.repository.reader import read_manifest
from peakpoint.state.capture import LOOP, StateEncoder
from peakpoint.state.divided import has_divided
from peakpoint.state.local_state import read_local
from peakpoint.state.saved import SavedState
from peakpoint.state.step_guard import StepGuard
from peakpoint.state.tensor_files import StagingBuffer
from peakpoint.store import Store
from peakpoint.training.outcome import Outcome, WarnOnce
from peakpoint.training.position import Position
from peakpoint.training.rank_states import check_outlines, check_shards, outline, own_state
from peakpoint.training.ranks import Ranks
from peakpoint.training.resume import StartPoint, restore_rank
from peakpoint.training.run_writer import RunWriter, SaveOptions
from peakpoint.training.shard_writer import ShardWriter
from peakpoint.training.state_changes import replicated_elements, same_shards


class SharedWriter:
    """Does for every rank what ``RunWriter`` does for one process; every method is called on all of them.

    Args:
        ranks: of the training.
        store: the repository, as this rank sees it.
        run: the run's name.
        state: of this rank.
        options: of its saves.
        make: makes the writer of rank 0.

    Attributes:
        started: whether the run has begun, from a checkpoint or from nothing.
        exists: whether the run had checkpoints when this was made, damaged ones included.
        guard: of the state.

    Raises:
        StoreError: a rank does not see the directory that rank 0 writes.
    """

    def __init__(
        self,
        ranks: Ranks,
        store: Store,
        run: str,
        state: dict[str, Any],
        options: SaveOptions,
        make: Callable[[], RunWriter],
    ) -> None:
        self._ranks, self._store, self._run, self._state = ranks, store, run, state
        self._first: RunWriter | None = None
        self._shards: ShardWriter | None = None
        self._warn_once = WarnOnce()
        self.started = False
        self._is_saving = False

        def open_run() -> tuple[bool, str]:
            self._first = make()
            return self._first.resumption.exists, self._first.journal_key

        try:
            self.exists, journal_key = ranks.lead("Checkpointer", open_run)
            check_outlines(ranks.share("Checkpointer", lambda: self._look_around(journal_key)))
        except BaseException:
            self.release()
            raise
        self.guard = StepGuard(state) if self._first is None else self._first.guard
        shares = isinstance(options.buffer, StagingBuffer)
        self._encoder = StateEncoder(shares=shares) if self._first is None else self._first.encoder
        self._encoder.rank = ranks.rank
        self._is_divided = has_divided(state)
        if self._is_divided and ranks.size > 1:
            ranks.open_background()
            if self._first is None:
                self._shards = ShardWriter(
                    ranks, store, state, self._encoder, options.buffer, self.guard, overlap=options.overlap
                )

    @property
    def first(self) -> RunWriter:
        """The writer itself; on rank 0 only."""
        assert self._first is not None
        return self._first

    def _look_around(self, journal_key: str) -> dict[str, list[str]]:
        """See that the directory is that of rank 0; returns the outline of the state."""
        if self._ranks.size > 1 and self._store.size(journal_key) is None:
            raise StoreError(self._not_shared())
        return outline(self._state)

    def _not_shared(self) -> str:
        return (
            f"{self._store.location} on {socket.gethostname()} is not the directory that rank 0 writes: it has nothing "
            f"of this training's run {self._run!r}. Ranks on several hosts need a directory that all of them see"
        )

    def restore(self, choice: str, *, strict: bool) -> StartPoint:
        """Restore the state of every rank from the checkpoint that rank 0 chooses and all of them can read.

        Args:
            choice: see the argument ``resume`` of ``Checkpointer``.

        Returns:
            Where this rank starts; only on rank 0 with the history.
        """
        saved = self._read(choice)
        if isinstance(saved, StartPoint):
            return saved
        starts: list[StartPoint] = []

        def restore() -> None:
            starts.append(restore_rank(saved, self._run, self._state, self._ranks, strict=strict))

        self._ranks.share("resume", restore)
        (start,) = starts
        assert start.report is not None
        skipped = self._ranks.lead("resume", lambda: self.first.resumption.skipped)
        start = replace(start, report=replace(start.report, skipped=skipped))
        if self._shards is not None and saved.manifest.run == self._run:
            self._shards.inherit(saved.manifest)
        return start if self._first is None else self.first.resumption.complete(start, saved.manifest)

    def _read(self, choice: str) -> SavedState | StartPoint:
        """Read the first checkpoint that every rank can read; returns the start where the run begins from nothing."""
        manifests: list[Manifest] = []
        contents: list[SavedState] = []
        failure: Error | None = None

        def propose() -> tuple[str, str, str] | StartPoint:
            manifest = self.first.resumption.candidate(choice, failure)
            if isinstance(manifest, StartPoint):
                return manifest
            manifests[:] = [manifest]
            return manifest.run, manifest.name, manifest.id

        def read() -> Error | None:
            assert not isinstance(candidate, StartPoint)
            (manifest,) = manifests or [self._look_up(*candidate)]
            try:
                contents[:] = [read_local(self._store, manifest, self._state)]
            except (CorruptError, FormatError, NotFoundError) as error:
                return error
            return None

        while not isinstance(candidate := self._ranks.lead("resume", propose), StartPoint):
            failure = next(filter(None, self._ranks.share_long("resume", read)), None)
            if failure is None:
                return contents[0]
        return candidate

    def _look_up(self, run: str, name: str, identity: str) -> Manifest:
        """Return the manifest that rank 0 has read."""
        try:
            manifest = read_manifest(self._store, run, name)
        except NotFoundError as error:
            raise StoreError(self._not_shared()) from error
        if manifest.id != identity:
            raise CorruptError(self._not_shared())
        return manifest

    def start(self, origin: StartPoint, position: Position) -> list[str]:
        """Begin to write after a start point; returns what people should know."""
        notices = self._ranks.lead("resume", lambda: self.first.start(origin, position))
        self.started = True
        return notices

    def moment(self, position: Position, metrics: Mapping[str, float]) -> Manifest:
        """Return a manifest of the present moment."""
        return self._ranks.lead("save", lambda: self.first.moment(position, metrics))

    def save(self, moment: Manifest, position: Position, why_stop: str | None) -> Outcome:
        """Save a moment, if there is a reason to, with what each rank has for itself; see ``RunWriter.save``."""

        def look_at_own() -> tuple[dict[str, Any], dict[str, object], dict[str, object]]:
            rank_state = own_state(self._state, position) if self._ranks.rank else {}
            return rank_state, replicated_elements(self._state), same_shards(self._state, self._ranks.size)

        def save_all() -> Outcome:
            check_shards([shards for _, _, shards in shares])
            self._warn_of_replicas([elements for _, elements, _ in shares])
            return self.first.save(moment, position, why_stop, rank_states)

        several = bool(moment.reasons) and self._ranks.size > 1
        waited = self._settle("save") if several else 0.0
        shares = self._ranks.share("save", look_at_own, only_first=True) if several else []
        rank_states = [] if self._ranks.rank else [rank_state for rank_state, _, _ in shares[1:]]
        if moment.reasons and self._is_divided:
            state = {**self._state, LOOP: rank_states} if rank_states else self._state
            self._encoder.plan(state, lambda work: self._ranks.share("save", work))
            if self._shards is not None:
                self._shards.capture()  # while rank 0 does
        try:
            outcome = self._ranks.lead("save", save_all)
        except SaveFailedError as error:
            if isinstance(error.outcome, Outcome):
                self._save_shards(moment, error.outcome)
            raise
        self._save_shards(moment, outcome)
        return replace(outcome, waited_seconds=outcome.waited_seconds + waited)

    def _save_shards(self, moment: Manifest, outcome: Outcome) -> None:
        self._is_saving = outcome.name is not None
        if self._shards is not None and outcome.name is not None:
            self._shards.write(replace(moment, name=outcome.name))

    def _settle(self, call: str) -> float:
        """Wait on every rank for its part of the save under way, however long that takes; returns the seconds."""
        begin = time.perf_counter()
        if self._is_saving and self._ranks.size > 1:
            self._is_saving = False
            self._ranks.share_long(call, self._settle_own)
        return time.perf_counter() - begin

    def _settle_own(self) -> None:
        if self._first is not None:
            self._first.settle()
        if self._shards is not None:
            self._shards.wait()

    def _warn_of_replicas(self, elements: Sequence[Mapping[str, object]]) -> None:
        for rank, of_rank in enumerate(elements):
            for part, values in of_rank.items():
                if values != elements[0].get(part):
                    self._warn_once(
                        part,
                        f"what state[{part!r}] holds on rank {rank} is not what rank 0 holds, which is saved: a resume "
                        "gives that to every rank. Parameters are kept alike by DistributedDataParallel, buffers "
                        "of layers such as BatchNorm by SyncBatchNorm, or by layers that have none",
                    )

    def wait(self) -> None:
        """Wait for the save under way."""

        def wait() -> None:
            self.first.wait()

        self._settle("wait")
        self._ranks.lead("wait", wait)

    def forget(self, ids: Collection[str]) -> None:
        """Wait for the save under way, and give up a failed one of these."""
        self._settle("report")
        self._ranks.lead("report", lambda: self.first.forget(ids))

    def remove(self, moments: Iterable[Manifest], reason: str) -> None:
        """Remove checkpoints that are wrong, at once."""
        self._settle("report")
        self._ranks.lead("report", lambda: self.first.remove(moments, reason))

    def finish(self, why: str, *, apply_rules: bool, together: bool) -> None:
        """Make everything durable and let go of the run; see ``RunWriter.finish``.

        Args:
            why: for the journal.
            apply_rules: whether the rules are applied if nothing was saved.
            together: whether every rank comes here; with an error, only this one may.
        """

        def finish() -> None:
            if self._first is not None:
                self._first.finish(why, apply_rules=apply_rules)

        try:
            if together:
                with contextlib.suppress(ConflictError):  # the next call says so
                    self._settle("close")
                self._ranks.lead("close", finish)
            else:
                finish()
        finally:
            self._end()

    def release(self) -> None:
        """Let go of the run without a trace in the journal: the training has not begun."""
        if self._first is not None:
            self._first.release()
        self._end()

    def _end(self) -> None:
        try:
            if self._shards is not None:
                self._shards.wait()
        finally:
            if self._first is None and "guard" in vars(self):
                self.guard.stop()
            self._ranks.close()
