"""The checkpointer: what a training loop holds in its hand.

A report goes this way: it is written to the journal; the rules say whether they would claim a checkpoint of this
moment; if one would, the state is copied and training goes on while a thread commits the copy; after the commit the
rules say which checkpoints go.
"""

import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, SupportsIndex

from peakpoint import rules
from peakpoint.errors import ConfigError, ConflictError, Error, PeakpointWarning, SaveFailedError
from peakpoint.format import layout, names
from peakpoint.format.amounts import read_bytes, read_duration
from peakpoint.format.events import STOPPED, Closed, Opened, Reported, Started
from peakpoint.format.manifest import Forks, Manifest
from peakpoint.format.metrics import read_metrics
from peakpoint.format.names import DEFAULT_TEMPLATE, did_you_mean
from peakpoint.repository.annotations import LiveAnnotations
from peakpoint.repository.commit import unused_name
from peakpoint.repository.journal import Journal
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.reader import find_damage
from peakpoint.repository.root import ensure_repository, ensure_run
from peakpoint.repository.run_audit import clean_run
from peakpoint.rules import Rule
from peakpoint.rules.history import Smoothing, smoothing_windows
from peakpoint.rules.stopping import EarlyStopping
from peakpoint.rules.stopping import StoppingState as StopWatch
from peakpoint.state.capture import StateEncoder, capture, check_state
from peakpoint.state.host_copy import NOTHING
from peakpoint.state.restore import LoadReport
from peakpoint.state.step_guard import StepGuard
from peakpoint.state.streamed_copy import SMALLEST, Ring
from peakpoint.state.tensor_files import Staging
from peakpoint.store import Hold, Store, holder_note, open_store
from peakpoint.training import unclosed
from peakpoint.training.loop import Loop, count
from peakpoint.training.outcome import Outcome, classes, say, warn, written_by
from peakpoint.training.preemption import Preempt, Watch, deliver_again, run_earlier
from peakpoint.training.resume import Resumption, restore_generators, resumption
from peakpoint.training.rule_changes import former_rules
from peakpoint.training.saver import Failure, Job, Saver
from peakpoint.training.turns import Late, Turns


class Checkpointer:
    """Saves a training by rules, and continues it where it stopped.

    One process writes a run at a time. Use it as a context manager, or call ``close`` at the end: what was saved is
    durable before the interpreter ends in any case, but a save that failed can then only be said, not raised.

    Args:
        root: the repository: a directory, created when it does not exist, or a store.
        run: the run's name.
        state: what is saved: part name to a module, an optimizer, anything with ``state_dict`` and
            ``load_state_dict``, a random generator, or a plain value. Plain values that cannot be changed in place
            are read and set through ``checkpointer.state``.
        keep: the rules; a moment is saved if and only if one of them would claim it.
        stop: when the loop should end early.
        resume: ``"auto"`` continues from the newest good checkpoint if there is one, ``"must"`` insists that there is
            one, ``"never"`` starts from nothing, and a ref starts from that checkpoint, once: when the same command is
            run again after that, the run goes on from its own newest checkpoint.
        strict: refuse to resume when anything does not fit; otherwise restore what fits and say what did not.
        overlap: copy what only ``optimizer.step()`` changes (the parameters and moments of the optimizers in the
            state) while the next forward and backward pass runs; the next step waits for the copy. Everything else is
            copied before ``report`` returns. Pass False if your loop changes weights outside ``step()``.
        capture_bytes: the most memory that the copy of the state may take: bytes, or text such as ``"256 MiB"``. By
            default a copy has room for the whole state. With less, ``report`` waits until the state has passed through
            that memory to the disk, and a save that fails cannot be written again.
        undo_for: how long what the rules remove can be brought back with ``peakpoint undo``: a ``timedelta`` or text
            such as ``"1h"``; ``"0"`` frees the space at once. By default 24 hours for what goes because the rules have
            changed, which is said when the run is continued, and 0 for what goes from save to save. When space is
            short, the trash goes first.
        name: the template of checkpoint names; see ``peakpoint.format.names.checkpoint_name``.
        preempt: which signals mean preemption, and the exit code; None watches none.
        clock: tells the time.
        announce: receives sentences for people; prints to standard error by default.

    Raises:
        ConfigError: an argument that cannot work.
        ConflictError: another process is writing this run, and the message names it; or the run is archived.
        StoreError: the repository cannot be written.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> model = torch.nn.Linear(2, 1)
        >>> with pp.Checkpointer(tempfile.mkdtemp(), run="demo", state={"model": model},
        ...                      keep=[pp.Best("loss", "min")]) as ckpt:
        ...     for epoch in ckpt.epochs(3):
        ...         outcome = ckpt.report(loss=1.0 + epoch)
        >>> outcome.saved
        False
    """

    _closed = True  # until it is made

    def __init__(
        self,
        root: str | os.PathLike[str] | Store,
        *,
        run: str,
        state: Mapping[str, Any],
        keep: Iterable[Rule],
        stop: EarlyStopping | None = None,
        resume: str = "auto",
        strict: bool = True,
        overlap: bool = True,
        capture_bytes: int | str | None = None,
        undo_for: timedelta | str | None = None,
        name: str = DEFAULT_TEMPLATE,
        preempt: Preempt | None = Preempt(),  # noqa: B008 - a frozen value
        clock: Clock = utc_now,
        announce: Callable[[str], None] = say,
    ) -> None:
        self.run = names.check_run(run)
        self.state = check_state(state)
        self.rules = rules.check_rules(keep)
        _check_needs(self.rules, self.state)
        self._resume, self._strict = resume, strict
        self._overlap = overlap
        self._template = names.check_template(name)
        self._clock, self._announce = clock, announce
        self._store = open_store(root)
        self._buffer = _buffer(capture_bytes)
        kept_for = None if undo_for is None else read_duration("undo_for", undo_for)
        self._encoder = StateEncoder(shares=isinstance(self._buffer, Staging))
        self._load: LoadReport | None = None
        self._exit_code = 0 if preempt is None else preempt.exit_code
        self._missed: set[str] = set()
        self._surfaced: Failure | None = None
        self._reported: Mapping[str, float] | None = None  # by the last report that counts
        self._stopping = None if stop is None else StopWatch(stop)
        self._stops_by = None if stop is None else stop.metric
        self._smoothing = Smoothing(smoothing_windows(self.rules))
        self._sequence = 0
        self._forks: Forks = ()
        self._parent: str | None = None
        self._generators: Mapping[str, Any] | None = None
        self._by = written_by()
        now = self._clock()
        ensure_repository(self._store, now)
        self._hold: Hold = self._store.hold(layout.writer_lock(self.run), holder_note(now))
        try:
            ensure_run(self._store, self.run, now, self._by, self.rules)
            clean_run(self._store, self.run, now)
            found = resumption(self._store, self.run)
            self._journal = Journal(self._store, self.run, self._clock)
            texts = tuple(rule.text for rule in self.rules)
            self._journal.append(Opened(at=now, by=self._by, rules=texts, state=classes(self.state)))
            self._watch = Watch(preempt)
        except BaseException:
            self._hold.release()
            raise
        self._resumption: Resumption | None = found  # None once the run has started: a long journal takes memory
        self._former_rules = former_rules(found.events)
        known = [*self.rules, *(rule for former in self._former_rules for rule in former or ())]
        self._ledger = LiveAnnotations(
            self._store, self.run, self._journal.segment, found.journal, found.manifests, known
        )
        self._saver = Saver(
            self._store, self.run, self._journal, self.rules, found.manifests, self._ledger, kept_for, self._hold
        )
        self._loop = Loop(self.state)
        self._guard = StepGuard(self.state)
        self._turns = Turns(self.state, self._guard)
        self._process = os.getpid()
        self._closed = False
        unclosed.watch(self)

    # --- continuing ---------------------------------------------------------------------------------------------

    def resume(self) -> LoadReport | None:
        """Restore the state from a checkpoint, as the argument ``resume`` says. The second call changes nothing.

        ``epochs`` and ``steps`` call it. Call it yourself before a loop of your own, as the last thing before it: it
        also sets the random generators.

        Returns:
            What was restored, None when the run starts from nothing.

        Raises:
            NotFoundError: ``resume="must"`` or a ref, and there is no such checkpoint.
            CorruptError: there are checkpoints, and all are damaged.
            MismatchError: the checkpoint does not fit the state; lists the differences. Nothing was changed.
        """
        self._check_open()
        if self._resumption is None:
            return self._load
        there = self._resumption
        found = there.restore(self._resume, self.state, strict=self._strict)
        self._resumption = None  # and the journal with it
        self._sequence, self._forks, self._parent = found.sequence, found.forks, found.parent
        self._load = found.report
        if found.report is not None:  # otherwise the steps made before this call count
            self._loop.go_to(found.position)
        for report in found.history:
            self._take(report.metrics)
        self._generators = found.generators
        self._saver.set_aside({*found.damaged, *find_damage(self._store, there.manifests)})
        newest_is_whole = bool(self._saver.committed) and self._saver.committed[-1].id == found.parent
        if newest_is_whole:
            self._encoder.inherit(self._saver.committed[-1])
        following = self._moment({}, self._clock())
        notices = self._saver.start(following, self._former_rules, newest_is_whole=newest_is_whole)
        self._journal.append(
            Started(at=self._clock(), checkpoint=found.parent, report=found.kept_report, requested=found.requested)
        )
        if self._load is None:
            self._announce(f"run {self.run!r} starts from the beginning ({found.why})")
        else:
            for line in self._load.skipped:
                warn(f"passed over a checkpoint: {line}")
            for line in self._load.missing:
                warn(f"not restored: {line}")
            self._restore_generators()
            self._announce(f"resumed {replace(self._load, missing=(), skipped=())}")  # the warnings have said those
        for sentence in notices:
            warn(sentence)
        return self._load

    def epochs(self, n: int) -> Iterator[int]:
        """The epochs that remain of ``range(n)``; the first is the one to run now.

        Continues inside an epoch when the checkpoint was taken inside one (see ``batches``), and ends early when
        ``stop`` says so. A report in the body, outside ``batches``, says that the epoch is complete: make it the last
        thing there. Random numbers that are drawn after it, and weights that change, are warned of.

        Raises:
            ConfigError: ``n`` is no whole number of at least 0, another loop of this checkpointer is running, or an
                optimizer, a scheduler or another part of the state has moved after the report: what was saved would
                have been one step short, and has been saved again as it is now.
        """
        total = count("n", n)
        self._enter("epochs")
        yield from self._turn_by_turn(self._loop.epochs(total, self._goes_on, self._end_turn))

    def steps(self, n: int) -> Iterator[int]:
        """The step indices that remain of ``range(n)``; a report in the body is made at step index + 1.

        Raises:
            ConfigError: ``n`` is no whole number of at least 0, or another loop of this checkpointer is running.
        """
        total = count("n", n)
        self._enter("steps")
        yield from self._turn_by_turn(self._loop.steps(total, self._goes_on, self._end_turn))

    def _turn_by_turn(self, loop: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from loop
        except GeneratorExit:
            self._turns.left()
            raise
        finally:
            self._guard.wait()  # what follows a loop may write to the weights

    def _goes_on(self) -> bool:
        return self.why_stop is None

    def _enter(self, which: str) -> None:
        self._check_open()
        if self._loop.running:
            raise ConfigError(f"{which}() inside another epochs() or steps() of the same checkpointer; use one loop")
        self._end_left_turn()
        first = self._resumption is not None
        self.resume()
        if self._load is not None and not first:
            # code between resume() and the loop may have drawn random numbers; the loop begins where it was saved
            self._restore_generators()

    def _restore_generators(self) -> None:
        if self._generators is not None:
            restore_generators(self._generators)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of one pass over ``loader``; reports in the body are made inside the epoch.

        A run that is continued from such a report goes on with the next batch. A loader that is part of the state and
        has ``state_dict`` (torchdata's ``StatefulDataLoader``) restores itself; any other is started again with the
        random generators of the beginning of the pass, and its first batches are drawn and dropped. Generators in the
        worker processes of a loader that restores itself begin anew; a warning says so.

        Raises:
            MismatchError: on continuing, the data is shorter than the place in it.
        """
        self._check_open()
        self._ensure_started()
        if self._loop.restarts_workers(loader, self.state):
            warn(
                "the run goes on inside an epoch, and the random generators of the loader's worker processes (torch, "
                "Python, NumPy in a Dataset) begin anew: what they draw, such as augmentations, differs in the rest of "
                "this epoch. To resume exactly, leave the loader out of state=, or report between epochs"
            )
        yield from self._turn_by_turn(self._loop.batches(loader, self.state, self._end_turn))

    # --- reporting ----------------------------------------------------------------------------------------------

    def report(
        self,
        metrics: Mapping[str, Any] | None = None,
        /,
        *,
        step: SupportsIndex | None = None,
        epoch: SupportsIndex | None = None,
        **named: Any,
    ) -> Outcome:
        """Say what the training has reached; save the moment if a rule would claim it.

        Returns as soon as the state is copied; the copy is written in the background.

        Args:
            metrics: metrics whose names are no Python names, such as ``{"val/loss": 0.5}``.
            step: optimizer steps completed; counted by itself in ``steps`` or when the state holds an optimizer.
            epoch: the epoch's index from 0; known by itself in ``epochs``.
            named: metrics by name; any real number, also of NumPy or a tensor with one element.

        Returns:
            Whether and why it is saved, and whether to stop.

        Raises:
            SaveFailedError: an earlier save failed. This report is recorded and, as far as possible, saved all the
                same; its outcome is the error's attribute ``outcome``.
            ConfigError: a metric that is no number, a state that cannot be kept, or a report in the middle of an epoch
                outside ``batches``.
            SystemExit: a preemption signal has arrived; the moment is durable.
        """
        self._check_open()
        self._ensure_started()
        self._end_left_turn()
        values = read_metrics({**(metrics or {}), **named})
        try:
            self._loop.check_place()
        except ConfigError:
            self._take_back(self._turns.taken_back(), "training went on after its report, in the same epoch")
            raise
        self._loop.advance(step, epoch)
        now, position = self._clock(), self._loop.position
        self._journal.append(
            Reported(at=now, report=position.report, step=position.step, epoch=position.epoch, metrics=values)
        )
        self._take(values)
        self._ledger.refresh()
        self._warn_about(values)
        moment = self._moment(values, now)
        derived = self._smoothing.means()
        seen = replace(moment, metrics={**values, **derived}) if derived else moment
        claims = rules.moment_claims(self.rules, self._saver.known, seen)
        signal = self._watch.arrived
        reasons = tuple(claim.reason for claim in claims)
        if signal is not None:
            reasons = (*reasons, f"preempted by {signal.name}")
        moment = replace(moment, reasons=reasons) if reasons else moment
        outcome = self._save(moment)
        if signal is not None:
            self._leave(signal.name)
        if self._loop.in_turn:
            self._turns.reported(moment if outcome.saved else None)
        return outcome

    def save(self, reason: str) -> Outcome:
        """Save the state now, whatever the rules say, and keep the checkpoint until it is removed by hand.

        Its metrics are those of the last report if nothing was trained since, none otherwise.

        Args:
            reason: why; stands in the manifest.

        Raises:
            SaveFailedError: an earlier save failed, as in ``report``.
            ConfigError: no reason is given, or the state cannot be kept.
        """
        self._check_open()
        self._ensure_started()
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigError("save() needs a reason: it is what tells you later why this checkpoint is here")
        names.check_text("the reason of save()", reason)
        reported = None if self._loop.trained else self._reported
        self._loop.catch_up()
        moment = self._moment(reported or {}, self._clock())
        return self._save(replace(moment, reasons=(f"saved on request: {reason}",), asked=reason))

    def wait(self) -> None:
        """Return when everything that was saved is durable.

        Raises:
            SaveFailedError: it is not. The state is still held, and is written again by the next report or ``close``.
        """
        self._check_open()
        self._saver.finish()
        self._tell_notices()
        failure = self._saver.failure()
        if failure is not None and failure is not self._surfaced:
            self._surfaced = failure
            raise self._failed_error(failure, None)

    def close(self) -> None:
        """Wait for the save under way, write a failed one again, and let go of the run. The second call does nothing.

        When nothing was saved since ``resume`` because nothing was left to do, the rules are applied now.

        Raises:
            SaveFailedError: a save failed and could not be made good; checkpoints committed earlier are untouched.
        """
        self._check_process()
        if self._closed:
            return
        try:
            self._end_left_turn()
        except Error as error:
            self.__exit__(type(error), error, None)
            raise
        why = "closed" if self.why_stop is None else f"{STOPPED}{self.why_stop}"
        try:
            # whoever stops a training that has just said what will go, keeps it
            failure = self._finish(why, catches_up=sys.exception() is None)
        finally:
            arrived = self._watch.stop()
        self._tell_notices()
        if failure is not None:
            raise self._failed_error(failure, None)
        deliver_again(arrived)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        if self._closed or self._process != os.getpid():
            return
        self._turns.left()  # the loop's own generator is still open
        try:
            self._end_left_turn()
        except Error as late:
            error.add_note(f"peakpoint: besides, {late}")
        try:
            failure = self._finish(f"{type(error).__name__}: {error}"[:500])
        finally:
            arrived = self._watch.stop()
        if failure is not None and not isinstance(error, SaveFailedError):
            error.add_note(f"peakpoint: besides, {self._failed_error(failure, None)}")
        self._tell_notices()
        if not isinstance(error, SystemExit):
            deliver_again(arrived)

    def __del__(self) -> None:
        if not self._closed and self._process == os.getpid():
            unclosed.let_go(self.run, self.close)

    @property
    def why_stop(self) -> str | None:
        """Why the loop should end, None when it should go on; derived from the reported history."""
        return None if self._stopping is None else self._stopping.why

    # --- the end of a turn --------------------------------------------------------------------------------------

    def _end_turn(self) -> None:
        """Refuse to go on when what has moved after a report makes its checkpoint wrong; see ``turns``."""
        late = self._turns.ended()
        if late is None:
            return
        if late.moves.wrong:
            self._loop.catch_up()
            raise late.error(self._made_good(late))
        for key, text in late.warnings().items():
            if key not in self._missed:
                self._missed.add(key)
                warn(text)

    def _end_left_turn(self) -> None:
        """``_end_turn`` of a turn that was left by ``break``, as soon as it is known that it was no error."""
        owed = self._turns.owed()
        if owed is None:
            return
        late, same = owed
        if same:
            raise late.error(self._made_good(late))
        names_of = ", ".join(f"report {moment.report} at step {moment.step}" for moment in late.saved)
        raise late.error(f"What was saved stays as it was at the report ({names_of})" if names_of else "")

    def _made_good(self, late: Late) -> str:
        """Save the state as it is at the end of the turn, and remove what was saved too early.

        Returns:
            What has become of it, for the error.
        """
        if not late.saved:
            return "Nothing was saved in this turn"
        self._saver.finish()
        self._saver.forget({moment.id for moment in late.saved})
        moment = replace(late.saved[-1], id=secrets.token_hex(8), step=self._loop.position.step)
        if late.moves.stepped:  # the metrics are those of other weights
            moment = replace(moment, metrics={}, reasons=("the training went on after its report",))
        try:
            name = self._save(moment).name
            self.wait()
        except SaveFailedError as error:
            return f"The state of now could not be saved, so that of the report stays: {error}"
        self._take_back(late.saved, late.reason)
        return f"Nothing is lost: the state as it is now is saved as {name}, in the place of the one of the report"

    def _take_back(self, moments: Iterable[Manifest], reason: str) -> None:
        """Remove checkpoints that are wrong, now that it is known."""
        self._saver.finish()
        self._saver.remove({moment.id for moment in moments}, reason)
        self._tell_notices()

    # --- the inside of a report ---------------------------------------------------------------------------------

    def _take(self, values: Mapping[str, float]) -> None:
        """Take a report into account that belongs to the history."""
        self._reported = values
        self._smoothing.report(values)
        if self._stopping is not None:
            self._stopping.report(values)

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise ConfigError(f"the checkpointer of run {self.run!r} is closed; make a new one to go on")

    def _check_process(self) -> None:
        """Refuse what was inherited by a fork: its threads, its lock and its journal are those of the parent."""
        if self._process != os.getpid():
            raise ConflictError(
                f"this checkpointer of run {self.run!r} belongs to process {self._process}, and this is a fork of it, "
                f"process {os.getpid()}: report and save in the process that trains, or make a checkpointer here"
            )

    def _ensure_started(self) -> None:
        if self._resumption is None:
            return
        if self._resume != "never" and self._resumption.exists:
            raise ConfigError(
                f"run {self.run!r} has checkpoints, and this training has not been restored from them: loop over "
                'ckpt.epochs(n) or ckpt.steps(n), or call ckpt.resume() before the loop, or pass resume="never"'
            )
        self.resume()

    def _warn_about(self, values: Mapping[str, float]) -> None:
        """Say once for each metric that it is not finite, and for rules and early stopping that theirs is missing."""
        for metric, value in values.items():
            if not math.isfinite(value):
                self._say_once(
                    f"finite {metric}",
                    f"{metric} is {value} at step {self._loop.position.step}: it never counts as best",
                )
        # what is allowed to be measured later is not missed
        for metric, _ in rules.ranking_metrics(rule for rule in self.rules if not getattr(rule, "pending", 0)):
            if metric not in values:
                self._say_once(
                    f"missing {metric}",
                    f"a report at step {self._loop.position.step} has no {metric!r}: rules that rank by it skip such "
                    f"reports; this one has {', '.join(values) or 'no metrics'}",
                )
        if self._stops_by is not None and self._stops_by not in values:
            self._say_once(
                f"stop {self._stops_by}",
                f"a report at step {self._loop.position.step} has no {self._stops_by!r}: early stopping does not count "
                f"such reports; this one has {', '.join(values) or 'no metrics'}"
                f"{did_you_mean(self._stops_by, list(values))}",
            )

    def _say_once(self, key: str, message: str) -> None:
        if key not in self._missed:
            self._missed.add(key)
            warnings.warn(message, PeakpointWarning, stacklevel=4)

    def _save(self, moment: Manifest) -> Outcome:
        """Save the moment if there is a reason to; then let an earlier failure be known."""
        begin = time.perf_counter()
        step_waited = self._guard.waited_seconds
        if moment.reasons:
            self._saver.finish()
        waited = time.perf_counter() - begin
        failed = self._heal()
        name, copied = None, 0.0
        if moment.reasons and self._may_replace_held(moment):
            begin = time.perf_counter()
            stepped = self._guard.owned()
            owned = stepped if self._overlap else NOTHING
            position = self._loop.position.as_plain()
            captured = capture(self.state, position, self._encoder, self._buffer, owned, stepped)
            copied = time.perf_counter() - begin
            self._sequence += 1
            self._ledger.add(moment.id, self._smoothing.means())
            draft = replace(
                moment,
                name=self._name(moment),
                sequence=self._sequence,
                parts=captured.parts,
                parent=self._saver.last_id or self._parent,
                timing={"waited_seconds": waited, "capture_seconds": copied, "bytes": float(captured.size_bytes)},
            )
            submitted = self._saver.submit(Job(draft, captured))
            self._guard.watch(captured.copying)  # which is complete, or has a thread to complete it
            if submitted:
                name = draft.name
                if not captured.stays:
                    captured.copying.wait()
                    copied = time.perf_counter() - begin
            else:
                self._alarm(self._saver.failure())
        self._tell_notices()
        why_stop = self.why_stop
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
        if failed is not None:
            raise self._failed_error(failed, outcome)
        return outcome

    def _heal(self) -> Failure | None:
        """Look whether a save has failed and, if so, write its state again.

        Returns:
            A failure that nobody has been told of yet.
        """
        failure = self._saver.failure()
        if failure is None:
            return None
        if failure.lost:
            self._saver.give_up()
            return None if failure is self._surfaced else failure
        again = self._saver.retry()
        told, self._surfaced = failure is self._surfaced, again
        if again is None:
            self._announce(f"checkpoint {failure.job.draft.name}, whose save had failed, is now saved")
        return again if told else failure

    def _may_replace_held(self, moment: Manifest) -> bool:
        """Whether the buffer is free, or holds a failed save that no rule wants any more once ``moment`` exists."""
        held = self._saver.failure()
        if held is None:
            return True
        seen = replace(moment, metrics={**moment.metrics, **self._smoothing.means()})
        if moment.asked is None and held.job.draft.id in rules.claims(self.rules, [*self._saver.known, seen]):
            self._say_once(
                f"held {held.job.draft.id}",
                f"step {moment.step} is not saved ({'; '.join(moment.reasons)}): the buffer still holds "
                f"{held.job.draft.name}, whose save fails: {held.error}",
            )
            return False
        self._saver.give_up()
        return True

    def _alarm(self, failure: Failure | None) -> None:
        if failure is not None:
            warnings.warn(f"{failure.job.draft.name} is NOT saved: {failure.error}", PeakpointWarning, stacklevel=4)

    def _tell_notices(self) -> None:
        for notice in self._saver.notices():
            warnings.warn(notice, PeakpointWarning, stacklevel=4)

    def _failed_error(self, failure: Failure, outcome: Outcome | None) -> SaveFailedError:
        draft = failure.job.draft
        held = self._saver.failure()
        if failure.lost:
            now = "there is no copy of that moment to be written again"
        elif held is not None and self._closed:
            now = "its state was written again at the end, and is lost"
        elif held is not None and held.job.draft.id == draft.id:
            now = "its state is still in memory and is written again by the next report and by close()"
        elif any(manifest.id == draft.id for manifest in self._saver.committed):
            now = "it has been written again since, and is durable now"
        else:
            now = "its state has been given up for a later one"
        error = SaveFailedError(
            f"the save of {draft.name} ({'; '.join(draft.reasons)}) failed: {failure.error}; {now}; "
            "checkpoints committed earlier are untouched"
        )
        error.outcome = outcome
        error.__cause__ = failure.error
        return error

    def _leave(self, signal: str) -> None:
        """Preemption: everything is made durable, earlier handlers run, the process leaves."""
        try:
            failure = self._finish(f"preempted by {signal}")
        finally:
            arrived = self._watch.stop()
        self._tell_notices()
        if failure is not None:
            raise self._failed_error(failure, None)
        self._announce(
            f"{signal}: saved at step {self._loop.position.step}; leaving with exit code {self._exit_code}, run the "
            "same command again to go on"
        )
        run_earlier(arrived)
        raise SystemExit(self._exit_code)

    def _finish(self, why: str, *, catches_up: bool = False) -> Failure | None:
        """Make everything durable and let go of the run.

        Args:
            why: the reason, for the journal.
            catches_up: whether the rules are applied if nothing was saved.

        Returns:
            A failure to be told.
        """
        self._closed = True
        try:
            self._saver.finish()
            if catches_up:
                self._saver.catch_up()
            failed = self._heal()
            self._saver.record()
            self._journal.append(Closed(at=self._clock(), why=why))
            return failed
        finally:
            self._loop.stop()
            self._guard.stop()
            try:
                self._journal.close()
            finally:
                self._hold.release()

    def _name(self, moment: Manifest) -> str:
        """A name for a moment that no checkpoint has."""
        metric = next((name for name, _ in rules.ranking_metrics(self.rules) if name in moment.metrics), None)
        name = names.checkpoint_name(
            self._template,
            run=self.run,
            id=moment.id,
            step=moment.step,
            epoch=moment.epoch,
            metric=metric,
            metrics=moment.metrics,
        )
        return unused_name(self._store, self.run, name)

    def _moment(self, values: Mapping[str, float], now: Any) -> Manifest:
        """What could become a checkpoint; it gets a name when it does."""
        position = self._loop.position
        return Manifest(
            id=secrets.token_hex(8),
            run=self.run,
            name="",
            sequence=self._sequence + 1,
            report=position.report,
            step=position.step,
            epoch=position.epoch,
            metrics=values,
            reasons=(),
            asked=None,
            parts={},
            files=(),
            parent=self._parent,
            forks=self._forks,
            created_at=now,
            written_by=self._by,
            timing={},
        )


def _check_needs(given: Iterable[Rule], state: Mapping[str, Any]) -> None:
    """Refuse rules that need parts which the state has not: a slip there would drop what is wanted."""
    for rule in given:
        for part in rule.needs or ():
            if part not in state:
                have = f"{', '.join(state)}{did_you_mean(part, list(state))}"
                raise ConfigError(f"rule {rule.text} needs a part {part!r}, and state= has {have}")


def _buffer(capture_bytes: int | str | None) -> Staging | Ring:
    if capture_bytes is None:
        return Staging()
    size = read_bytes("capture_bytes", capture_bytes)
    if size < SMALLEST:
        raise ConfigError(f"capture_bytes={capture_bytes!r} is too little to write in large blocks; give 1 MiB or more")
    return Ring(size)
