"""One process's hold on a run: everything that a training writes to it, from the opening to the end."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from peakpoint import rules
from peakpoint.errors import ConfigError, ConflictError, SaveFailedError
from peakpoint.format import layout
from peakpoint.format.amounts import read_bytes
from peakpoint.format.events import Closed, Opened, Reported, Started
from peakpoint.format.manifest import Forks, Manifest
from peakpoint.format.names import did_you_mean
from peakpoint.format.settings import Settings, settings_of
from peakpoint.repository.annotations import LiveAnnotations
from peakpoint.repository.journal import Journal
from peakpoint.repository.provenance import Clock
from peakpoint.repository.reader import find_damage
from peakpoint.repository.root import check_capitals, ensure_repository, ensure_run
from peakpoint.repository.run_audit import clean_run
from peakpoint.rules import Rule
from peakpoint.rules.history import Smoothing, smoothing_windows
from peakpoint.state.capture import StateEncoder, capture
from peakpoint.state.host_copy import NO_STORAGE
from peakpoint.state.origin import script_settings
from peakpoint.state.step_guard import StepGuard
from peakpoint.state.streamed_copy import SMALLEST_RING, RingBuffer
from peakpoint.state.tensor_files import StagingBuffer
from peakpoint.store import Hold, Store, holder_note
from peakpoint.training.outcome import Outcome, WarnOnce, warn
from peakpoint.training.position import Position
from peakpoint.training.ranks import Ranks, rank_advice
from peakpoint.training.records import draft_manifest, with_free_name, written_by
from peakpoint.training.resume import Resumption, StartPoint, resumption
from peakpoint.training.rule_changes import earlier_rules
from peakpoint.training.saver import FailedSave, SaveJob, Saver
from peakpoint.training.settings import changes
from peakpoint.training.shard_writer import RecordsOfOthers


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How a training saves.

    Attributes:
        template: of checkpoint names.
        overlap: whether copying goes on while training does.
        buffer: the memory that a copy of the state takes.
        undo_for: how long what the rules remove can be brought back; see ``Saver``.
        settings: of the training, for its records.
    """

    template: str
    overlap: bool
    buffer: StagingBuffer | RingBuffer
    undo_for: timedelta | None
    settings: Settings


class RunWriter:
    """Holds a run, and writes its journal and its checkpoints.

    Raises:
        ConflictError: another process is writing this run; or the run is archived.
        StoreError: the repository cannot be written.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        state: Mapping[str, Any],
        in_force: tuple[Rule, ...],
        options: SaveOptions,
        clock: Clock,
        announce: Callable[[str], None],
        ranks: Ranks,
    ) -> None:
        self._store, self._run, self._state, self._rules = store, run, state, in_force
        self._options, self._clock, self._announce = options, clock, announce
        self._ranks = ranks
        self.encoder = StateEncoder(shares=isinstance(options.buffer, StagingBuffer))
        self.encoder.settings = {part: script_settings(value) for part, value in state.items()}
        self._smoothing = Smoothing(smoothing_windows(in_force))
        self._warn_once = WarnOnce()
        self._surfaced: FailedSave | None = None  # the last failure that was raised
        self._sequence = 0
        self._forks: Forks = ()
        self._parent: str | None = None
        self._closed = False
        self._by = written_by()
        now, settings = clock(), options.settings
        ensure_repository(store, now)
        check_capitals(store, run, state)
        try:
            self._hold: Hold = store.hold(layout.writer_lock(run), holder_note(now))
        except ConflictError as error:
            advice = rank_advice()
            why = f"{str(error).partition(';')[0]}; {advice}" if advice else str(error)
            raise ConflictError(f"run {run!r} in {store.location} is {why}") from error
        try:
            ensure_run(store, run, now, self._by, in_force, settings)
            clean_run(store, run, now)
            past = resumption(store, run)
            self._journal = Journal(store, run, clock)
            texts = tuple(rule.text for rule in in_force)
            classes = {part: f"{type(value).__module__}.{type(value).__qualname__}" for part, value in state.items()}
            self._journal.append(
                Opened(at=now, by=self._by, rules=texts, state=classes, config=settings.config, tags=settings.tags)
            )
        except BaseException:
            self._hold.release()
            raise
        self._resumption: Resumption | None = past  # None once the run has started: a long journal takes memory
        self._earlier_rules = earlier_rules(past.journal.events)
        self._changed_settings = changes(settings_of(past.journal.events), settings)
        every_rule = [*in_force, *(rule for previous in self._earlier_rules for rule in previous or ())]
        existing = past.listing.manifests
        self._annotations = LiveAnnotations(store, run, self._journal.segment, past.journal, existing, every_rule)
        self._saver = Saver(
            store, run, self._journal, in_force, existing, self._annotations, options.undo_for, self._hold
        )
        self.guard = StepGuard(state)

    @property
    def resumption(self) -> Resumption:
        """The past of the run; before it starts."""
        assert self._resumption is not None
        return self._resumption

    def release(self) -> None:
        """Let go of the run without a trace in the journal: the training has not begun."""
        self.guard.stop()
        try:
            self._journal.close()
        finally:
            self._hold.release()

    def start(self, origin: StartPoint, position: Position) -> list[str]:
        """Begin to write after a start point; returns what people should know of rules that have changed."""
        manifests, self._resumption = self.resumption.listing.manifests, None
        self._sequence, self._forks, self._parent = origin.sequence, origin.forks, origin.parent
        self.encoder.settings = {**self.encoder.settings, **origin.settings}
        for report in origin.history:
            self._smoothing.report(report.metrics)
        self._saver.set_aside({*origin.damaged, *find_damage(self._store, manifests)})
        committed = self._saver.committed
        newest_is_whole = bool(committed) and committed[-1].id == origin.parent
        if newest_is_whole:
            self.encoder.inherit(committed[-1])
        following = self.moment(position, {})
        notices = self._saver.start(following, self._earlier_rules, newest_is_whole=newest_is_whole)
        now, last_report = self._clock(), origin.position.report
        self._journal.append(Started(at=now, checkpoint=origin.parent, report=last_report, requested=origin.requested))
        if self._changed_settings:
            self._announce(f"run {self._run!r} goes on with other settings: {self._changed_settings}")
        return notices + self._store.remarks()

    def moment(self, position: Position, metrics: Mapping[str, float]) -> Manifest:
        """Return a manifest of the present moment; it gets a name when it is saved."""
        at, sequence = self._clock(), self._sequence + 1
        return draft_manifest(self._run, sequence, position, metrics, at, self._by, self._parent, self._forks)

    def report(self, position: Position, metrics: Mapping[str, float]) -> Manifest:
        """Write a report to the journal; returns its moment, with the reasons for which the rules would keep it."""
        moment = self.moment(position, metrics)
        self._journal.append(
            Reported(at=moment.created_at, report=moment.report, step=moment.step, epoch=moment.epoch, metrics=metrics)
        )
        self._smoothing.report(metrics)
        self._annotations.refresh()
        claims = rules.moment_claims(self._rules, self._saver.known, self._smoothed(moment))
        return replace(moment, reasons=tuple(claim.reason for claim in claims))

    def _smoothed(self, moment: Manifest) -> Manifest:
        derived = self._smoothing.means()
        return replace(moment, metrics={**moment.metrics, **derived}) if derived else moment

    @property
    def journal_key(self) -> str:
        """Where the journal of this training is written."""
        return f"{layout.journal_prefix(self._run)}/{self._journal.segment}"

    def save(
        self, moment: Manifest, position: Position, why_stop: str | None, rank_states: Sequence[Mapping[str, Any]] = ()
    ) -> Outcome:
        """Save a moment if there is a reason to, and write again an earlier save that has failed.

        Args:
            rank_states: what the other ranks have for themselves, from rank 1 on.

        Raises:
            SaveFailedError: an earlier save failed, and nobody has been told of it; has the outcome.
        """
        begin = time.perf_counter()
        step_waited = self.guard.waited_seconds
        if moment.reasons:
            self._saver.finish()
        waited = time.perf_counter() - begin
        failure = self._heal()
        name, copied = None, 0.0
        if moment.reasons and self._may_replace_failed(moment):
            name, copied = self._submit(moment, position, waited, rank_states)
        self.warn_notices()
        outcome = Outcome(
            saved=name is not None,
            reasons=moment.reasons if name is not None else (),
            should_stop=why_stop is not None,
            why_stop=why_stop,
            name=name,
            step=moment.step,
            epoch=moment.epoch,
            waited_seconds=waited,
            capture_seconds=copied,
            step_waited_seconds=step_waited,
        )
        if failure is None:
            return outcome
        error = self._error_of(failure)
        error.outcome = outcome
        raise error

    def _submit(
        self, moment: Manifest, position: Position, waited: float, rank_states: Sequence[Mapping[str, Any]]
    ) -> tuple[str | None, float]:
        """Capture the state and begin its save.

        Returns:
            The name of the checkpoint, None when there is no space; and the seconds that copying took.
        """
        begin = time.perf_counter()
        stepped = self.guard.owned()
        owned = stepped if self._options.overlap else NO_STORAGE
        captured = capture(
            self._state, position.as_plain(), self.encoder, self._options.buffer, owned, stepped, ranks=rank_states
        )
        copied = time.perf_counter() - begin
        self._sequence += 1
        self._annotations.add(moment.id, self._smoothing.means())
        preferred = [metric for metric, _ in rules.ranking_metrics(self._rules)]
        draft = replace(
            with_free_name(self._store, moment, preferred, self._options.template),
            sequence=self._sequence,
            parts=captured.parts,
            parent=self._saver.last_id or self._parent,
            timing={"waited_seconds": waited, "capture_seconds": copied, "bytes": float(captured.size_bytes)},
        )
        job = SaveJob(draft, captured)
        if self.encoder.is_divided:
            job = SaveJob(draft, captured, ranks=self._ranks.size, written=RecordsOfOthers(self._ranks))
        submitted = self._saver.submit(job)
        self.guard.watch(captured.copying)  # which is complete, or has a thread to complete it
        if not submitted:
            failure = self._saver.failure()
            assert failure is not None
            warn(f"{failure.job.draft.name} is NOT saved: {failure.error}")
        elif isinstance(self._options.buffer, RingBuffer):
            captured.copying.wait()
            copied = time.perf_counter() - begin
        for part in captured.empty:
            self._warn_once(
                f"empty {part}",
                f"state[{part!r}] saves nothing: the state_dict() of {type(self._state[part]).__name__} is empty, so a "
                "resume does not restore it. Have it return what must come back, or leave the part out of state=",
            )
        return draft.name if submitted else None, copied

    def settle(self) -> None:
        """Wait until no save is under way, whatever has become of it."""
        self._saver.finish()

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            SaveFailedError: it failed.
        """
        self._saver.finish()
        self.warn_notices()
        failure = self._saver.failure()
        if failure is not None and failure is not self._surfaced:
            self._surfaced = failure
            raise self._error_of(failure)

    def _heal(self) -> FailedSave | None:
        """Write the state of a failed save again; returns a failure that nobody has been told of."""
        failure = self._saver.failure()
        if failure is None:
            return None
        surfaced = failure is self._surfaced
        if failure.lost:
            self._saver.give_up()
            return None if surfaced else failure
        self._surfaced = self._saver.retry()
        if self._surfaced is None:
            self._announce(f"checkpoint {failure.job.draft.name}, whose save had failed, is now saved")
        return self._surfaced if surfaced else failure

    def _may_replace_failed(self, moment: Manifest) -> bool:
        """Whether the buffer is free, or has a failed save that no rule would keep once ``moment`` exists."""
        failed = self._saver.failure()
        if failed is None:
            return True
        draft, known = failed.job.draft, [*self._saver.known, self._smoothed(moment)]
        if moment.asked is None and draft.id in rules.claims(self._rules, known):
            self._warn_once(
                f"failed {draft.id}",
                f"step {moment.step} is not saved ({'; '.join(moment.reasons)}): {draft.name}, which the rules keep, "
                f"could not be written and is still in memory: {failed.error}",
            )
            return False
        self._saver.give_up()
        return True

    def _error_of(self, failure: FailedSave) -> SaveFailedError:
        """Return the error of a failed save, which says what has become of its state."""
        draft, pending = failure.job.draft, self._saver.failure()
        if failure.lost:
            state = "there is no copy of that moment to be written again"
        elif pending is not None and self._closed:
            state = "its state was written again at the end, and is lost"
        elif pending is not None and pending.job.draft.id == draft.id:
            state = "its state is still in memory and is written again by the next report and by close()"
        elif any(manifest.id == draft.id for manifest in self._saver.committed):
            state = "it has been written again since, and is durable now"
        else:
            state = "it was replaced by a later checkpoint"
        error = SaveFailedError(
            f"the save of {draft.name} ({'; '.join(draft.reasons)}) failed: {failure.error}; {state}; "
            "checkpoints committed earlier are untouched"
        )
        error.__cause__ = failure.error
        return error

    def forget(self, ids: Collection[str]) -> None:
        """Wait for the save under way, and give up a failed one of these."""
        self._saver.forget(ids)

    def remove(self, moments: Iterable[Manifest], reason: str) -> None:
        """Remove checkpoints that are wrong, at once."""
        self._saver.remove({moment.id for moment in moments}, reason)
        self.warn_notices()

    def warn_notices(self) -> None:
        """Warn of what happened in the background."""
        for notice in self._saver.notices():
            warn(notice)

    def finish(self, why: str, *, apply_rules: bool) -> None:
        """Make everything durable and let go of the run.

        Args:
            why: for the journal.
            apply_rules: whether the rules are applied if nothing was saved.

        Raises:
            SaveFailedError: a save failed, and nobody has been told of it.
        """
        self._closed = True
        try:
            self._saver.finish()
            if apply_rules:
                self._saver.catch_up()
            failure = self._heal()
            self._saver.record()
            self._journal.append(Closed(at=self._clock(), why=why))
        finally:
            self.release()
        try:
            self.warn_notices()  # which may raise: warnings can be made errors
        finally:
            if failure is not None:
                raise self._error_of(failure)


def check_needs(in_force: Iterable[Rule], state: Mapping[str, Any]) -> None:
    """Refuse rules that need parts which the state lacks: with a slip there, checkpoints would lose parts.

    Raises:
        ConfigError: names the rule, the part and those of the state.
    """
    for rule in in_force:
        for part in rule.needs or ():
            if part not in state:
                parts = f"{', '.join(state)}{did_you_mean(part, list(state))}"
                raise ConfigError(f"rule {rule.text} needs a part {part!r}, and state= has {parts}")


def capture_buffer(capture_bytes: int | str | None) -> StagingBuffer | RingBuffer:
    """Return the memory for copies of the state: as large as it is, or bounded.

    Raises:
        ConfigError: the bound is not a number of bytes, or too small.
    """
    if capture_bytes is None:
        return StagingBuffer()
    size = read_bytes("capture_bytes", capture_bytes)
    if size < SMALLEST_RING:
        raise ConfigError(f"capture_bytes={capture_bytes!r} is too small to write in large blocks; give 1 MiB or more")
    return RingBuffer(size)
