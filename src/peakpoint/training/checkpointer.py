"""The checkpointer of a training loop.

A report goes this way: it is written to the journal; the rules decide whether they would keep a checkpoint of this
moment; if so, the state is copied and training goes on while a thread commits the copy; after the commit the rules
decide which checkpoints are removed.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from signal import Signals
from typing import Any, SupportsIndex

from peakpoint.errors import ConfigError, SaveFailedError
from peakpoint.format import names
from peakpoint.format.amounts import read_duration
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import read_metrics
from peakpoint.format.names import DEFAULT_TEMPLATE
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.root import check_not_renamed
from peakpoint.rules import Rule
from peakpoint.rules.stopping import EarlyStopping, StoppingState
from peakpoint.state import rng
from peakpoint.state.parts import check_state
from peakpoint.state.restore import LoadReport
from peakpoint.store import Store, open_store
from peakpoint.training import arguments, exit_hook
from peakpoint.training.closing import Closing
from peakpoint.training.late_changes import LateChangeCheck
from peakpoint.training.loop import Loop, LoopMethod, count
from peakpoint.training.metric_warnings import MetricWarnings
from peakpoint.training.outcome import Outcome, warn
from peakpoint.training.preemption import Preempt, SignalWatch
from peakpoint.training.rank_reports import REDUCTIONS, RankReport, first_signal, metrics_of
from peakpoint.training.ranks import Ranks
from peakpoint.training.run_end import RunEnd
from peakpoint.training.run_writer import RunWriter, SaveOptions, capture_buffer, check_needs
from peakpoint.training.settings import read_settings
from peakpoint.training.shared_writer import SharedWriter


class Checkpointer(Closing):
    """Saves a training by rules, and continues it where it stopped.

    One process writes a run at a time. Use it as a context manager, or call ``close`` at the end: what was saved is
    durable before the interpreter ends in any case, but a save that failed can then only be printed, not raised.

    Args:
        root: the repository: a directory, created when it does not exist, or a store.
        run: the run's name.
        state: what is saved: part name to a module, an optimizer, anything with ``state_dict`` and
            ``load_state_dict``, a random generator, or a plain value. Plain values that cannot be changed in place
            are read and set through ``checkpointer.state``.
        keep: the rules; a checkpoint is written when at least one of them would keep it, and removed when none does.
        stop: ends the loop early.
        resume: ``"auto"`` continues from the newest good checkpoint if there is one, ``"must"`` insists that there is
            one, ``"never"`` starts from nothing, and a ref starts from that checkpoint, once: when the same command is
            run again after that, the run goes on from its own newest checkpoint.
        strict: refuse to resume when anything does not fit; otherwise restore what fits and warn of the rest.
        overlap: copy what only ``optimizer.step()`` changes (the parameters and moments of the optimizers in the
            state) while the next forward and backward pass runs; the next step waits for the copy. Everything else is
            copied before ``report`` returns. Pass False if your loop changes weights outside ``step()``.
        capture_bytes: the most memory that the copy of the state may take: bytes, or text such as ``"256 MiB"``. By
            default a copy has room for the whole state. With less, ``report`` waits until the state has passed through
            that memory to the disk, and a save that fails cannot be written again.
        undo_for: how long what the rules remove can be brought back with ``peakpoint undo``: a ``timedelta`` or text
            such as ``"1h"``; ``"0"`` frees the space at once. By default 24 hours for what is removed because the
            rules have changed (a warning says so when the run is continued), and 0 for what each save replaces. When
            space is short, the trash is emptied first.
        name: the template of checkpoint names; see ``peakpoint.format.names.checkpoint_name``.
        config: settings to be kept with the run: a dict, an ``argparse.Namespace`` or an instance of a dataclass, of
            numbers, texts, true and false, None, and lists and dicts of these. ``peakpoint select`` finds them as
            ``config.lr``. Everybody who can read the repository can read them: leave passwords out. Settings that
            change when the run is continued are said, and the newest count.
        tags: words for the run, which ``peakpoint select`` finds as ``tag``.
        on_save_error: ``"warn"`` warns of a save that has failed, where ``"raise"`` raises ``SaveFailedError``: for
            loops that must go on. The end of the training says how many have failed.
        preempt: which signals mean preemption, and the exit code; None watches none.

    Raises:
        ConfigError: an argument is wrong; the message says which values work.
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

    _clock: Clock = staticmethod(utc_now)

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
        config: object = None,
        tags: Iterable[str] | None = None,
        on_save_error: str = "raise",
        preempt: Preempt | None = Preempt(),  # noqa: B008 - a frozen value
    ) -> None:
        self.run = names.check_run(run)
        self.state = check_state(state)
        self.rules = arguments.check_keep(keep)
        check_needs(self.rules, self.state)
        arguments.check_flags(strict=strict, overlap=overlap)
        arguments.check_objects(root, name, stop, preempt)
        self._resume, self._strict = arguments.check_resume(resume, self.run), strict
        self._only_warns = arguments.check_choice("on_save_error", on_save_error, arguments.ON_SAVE_ERROR) == "warn"
        self._stopping = None if stop is None else StoppingState(stop)
        self._why_stop: str | None = None
        self._exit_code = 0 if preempt is None else preempt.exit_code
        self._load: LoadReport | None = None
        self._last_metrics: Mapping[str, float] | None = None  # of the last report in the history
        self._generators: Mapping[str, Any] | None = None
        self._metric_warnings = MetricWarnings(self.rules, stop)
        options = SaveOptions(
            template=names.check_template(name),
            overlap=overlap,
            buffer=capture_buffer(capture_bytes),
            undo_for=None if undo_for is None else read_duration("undo_for", undo_for),
            settings=read_settings(config, tags),
        )
        store = open_store(root)
        self._ranks = Ranks(self.run)
        if self._ranks.rank:
            self._announce = lambda _: None

        def make_writer() -> RunWriter:
            if self._resume != "never":
                check_not_renamed(store, self.run)
            return RunWriter(store, self.run, self.state, self.rules, options, self._clock, self._announce, self._ranks)

        self._writer = SharedWriter(self._ranks, store, self.run, self.state, options, make_writer)
        try:
            self._signals = SignalWatch(preempt)
        except BaseException:
            self._writer.release()
            raise
        self._loop = Loop(self.state, strict=strict)
        self._late_changes = LateChangeCheck(self.state, self._writer, self._loop, self._save, self._ranks)
        self._end = RunEnd(self._loop, self._writer, self._save_or_warn, self._announce)
        self._process = os.getpid()
        self._closed = False
        exit_hook.watch(self)

    # --- continuing ---------------------------------------------------------------------------------------------

    def resume(self) -> LoadReport | None:
        """Restore the state from a checkpoint, as the argument ``resume`` says. The second call changes nothing.

        ``epochs`` and ``steps`` call it. Call it yourself before a loop of your own, as the last thing before it: it
        also sets the random generators.

        Returns:
            The restored parts and the checkpoint, None when the run starts from nothing.

        Raises:
            NotFoundError: ``resume="must"`` or a ref, and there is no such checkpoint.
            CorruptError: there are checkpoints, and all are damaged.
            MismatchError: the checkpoint does not fit the state; lists the differences. Nothing was changed.
        """
        self._check_open()
        if self._writer.started:
            return self._load
        start = self._writer.restore(self._resume, strict=self._strict)
        self._load = start.report
        if start.report is not None:  # otherwise the steps made before this call count
            self._loop.go_to(start.position)
        for report in start.history:
            self._note_metrics(report.metrics)
        self._generators = start.generators
        self._end.mark_saved()
        notices = self._writer.start(start, self._loop.position)
        self._why_stop = self._ranks.lead("resume", lambda: self._why_stop)
        if self._ranks.rank:
            self._restore_generators()
        elif self._load is None:
            self._announce(f"new run {self.run!r} ({start.why})")
        else:
            for line in self._load.skipped:
                warn(f"skipped a checkpoint: {line}")
            for line in self._load.missing:
                warn(f"not restored: {line}")
            self._restore_generators()
            self._announce(f"resumed {replace(self._load, missing=(), skipped=())}")  # the warnings have said those
        for sentence in [] if self._ranks.rank else notices:
            warn(sentence)
        return self._load

    def epochs(self, n: int) -> Iterator[int]:
        """Yield the epochs that remain of ``range(n)``; the first is the one to run now.

        Continues inside an epoch when the checkpoint was taken inside one (see ``batches``), and ends early when
        ``stop`` says so. A report in the body, outside ``batches``, says that the epoch is complete: make it the last
        line there. Random numbers that are drawn after it, and weights that change, are warned of.

        Raises:
            ConfigError: ``n`` is not a whole number of at least 0, another loop of this checkpointer is running, or an
                optimizer, a scheduler or another part of the state has changed after the report: its checkpoint would
                have been one step short, and has been saved again with the present state.
        """
        yield from self._iterate(self._loop.epochs, n)

    def steps(self, n: int) -> Iterator[int]:
        """Yield the step indices that remain of ``range(n)``; a report in the body is made at step index + 1.

        Raises:
            ConfigError: ``n`` is not a whole number of at least 0, or another loop of this checkpointer is running.
        """
        yield from self._iterate(self._loop.steps, n)

    def _guarded(self, loop: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from loop
        except GeneratorExit:
            self._late_changes.interrupted()
            raise
        finally:
            self._writer.guard.wait()  # the code after a loop may write to the weights

    def _iterate(self, loop: LoopMethod, n: SupportsIndex) -> Iterator[int]:
        total = count(f"the argument of {loop.__name__}()", n)
        self._check_open()
        if self._loop.running:
            raise ConfigError(
                f"{loop.__name__}() inside another epochs() or steps() of the same checkpointer; use one loop"
            )
        self._late_changes.end_interrupted()
        first = not self._writer.started
        self.resume()
        if self._load is not None and not first:
            # code between resume() and the loop may have drawn random numbers; the loop begins where it was saved
            self._restore_generators()
        kind = loop.__name__.removesuffix("s")
        begun = self._loop.complete(kind)
        yield from self._guarded(loop(total, lambda: self.why_stop is None, self._late_changes.end))
        self._end.end_loop(kind, begun, total, self.why_stop, self._last_metrics or {})

    def _restore_generators(self) -> None:
        if self._generators is not None:
            for line in rng.restore(dict(self._generators)):
                warn(f"not restored: {line}")

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of one pass over ``loader``; reports in the body are made inside the epoch.

        A run that is continued from such a report goes on with the next batch. A loader that is part of the state and
        has ``state_dict`` restores itself; any other is started again with the random generators of the beginning of
        the pass, its own among them, and its first batches are drawn and dropped. A warning says what begins anew.

        Raises:
            ConfigError: inside another ``batches``, or the loader is an iterator that has begun.
            MismatchError: on continuing, the loader would make other batches (another batch size, other data), and the
                training is strict; or the data ends before the place of the checkpoint.
        """
        self._check_open()
        self._ensure_started()
        yield from self._guarded(self._loop.batches(loader, self._late_changes.end))

    @property
    def batch(self) -> int | None:
        """The index of the batch in its pass over the data, from 0, also after a resume; None outside ``batches``."""
        return self._loop.batch

    # --- reporting ----------------------------------------------------------------------------------------------

    def report(
        self,
        metrics: Mapping[str, Any] | None = None,
        /,
        *,
        step: SupportsIndex | None = None,
        epoch: SupportsIndex | None = None,
        save: str | None = None,
        reduce: str | None = None,
        **named: Any,
    ) -> Outcome:
        """Report metrics; save the moment if a rule would keep it.

        Returns as soon as the state is copied; the copy is written in the background.

        Args:
            metrics: metrics whose names are not Python names, such as ``{"val/loss": 0.5}``.
            step: optimizer steps completed; counted by itself in ``steps`` or when the state holds an optimizer.
            epoch: the epoch's index from 0; known by itself in ``epochs``.
            save: a reason to save this moment whatever the rules say, and to keep it as ``save`` does.
            reduce: where several processes train, ``"mean"``, ``"max"``, ``"min"`` or ``"sum"`` over what they report;
                by default the metrics of rank 0 count.
            named: metrics by name; any real number, also of NumPy or a tensor with one element.

        Raises:
            SaveFailedError: an earlier save failed. This report is recorded and, as far as possible, saved all the
                same; its outcome is the error's attribute ``outcome``.
            ConfigError: a metric is not a number, the state cannot be stored, or the report stands in the middle of an
                epoch outside ``batches``.
            SystemExit: a preemption signal has arrived; the moment is durable.
        """
        self._check_open()
        self._ensure_started()
        self._late_changes.end_interrupted()
        try:
            self._loop.check_place()
        except ConfigError:
            reported = self._late_changes.withdraw_reports()
            self._writer.remove(reported, "training went on after its report, in the same epoch")
            raise

        def read() -> RankReport:
            values = read_metrics(arguments.named_metrics(metrics, named))
            request = None if save is None else arguments.check_reason(save)
            how = None if reduce is None else arguments.check_choice("reduce", reduce, tuple(REDUCTIONS))
            at_step = None if step is None else count("step", step)
            at_epoch = self._loop.epoch if epoch is None else count("epoch", epoch)
            return RankReport(values, request, how, at_step, at_epoch, self._signals.arrived)

        reports = self._ranks.share("report", read)
        values, signal = metrics_of(reports), first_signal(reports)
        self._loop.advance(step, epoch)
        moment = self._ranks.lead("report", lambda: self._judge(values, reports[0].request, signal))
        outcome = self._save_or_warn(moment)
        if signal is not None:
            self._leave(signal.name, outcome)
        if self._loop.in_iteration:
            self._late_changes.reported(moment if outcome.saved else None)
        return outcome

    def _judge(self, values: Mapping[str, float], request: str | None, signal: Signals | None) -> Manifest:
        """Return the moment of a report, with the reasons to save it; on rank 0 only."""
        moment = self._writer.first.report(self._loop.position, values)
        self._note_metrics(values)
        reasons = [*moment.reasons, *self._metric_warnings.check(values, self._loop.position)]
        if signal is not None:
            reasons.append(f"preempted by {signal.name}")
        if request is not None:
            reasons.append(f"saved on request: {request}")
        return replace(moment, reasons=tuple(reasons), asked=request)

    def save(self, reason: str) -> Outcome:
        """Save the state now, whatever the rules say, and keep the checkpoint until it is removed by hand.

        Its metrics are those of the last report if nothing was trained since, none otherwise.

        Args:
            reason: why; stands in the manifest.

        Raises:
            SaveFailedError: an earlier save failed, as in ``report``.
            ConfigError: the reason is empty, or the state cannot be stored.
        """
        self._check_open()
        self._ensure_started()
        request = self._ranks.share("save", lambda: arguments.check_reason(reason))[0]
        self._loop.check_save()
        metrics = None if self._loop.trained else self._last_metrics
        self._loop.catch_up()
        moment = self._writer.moment(self._loop.position, metrics or {})
        return self._save_or_warn(replace(moment, reasons=(f"saved on request: {request}",), asked=request))

    def wait(self) -> None:
        """Return when everything that was saved is durable.

        Raises:
            SaveFailedError: a save failed. Its state is still in memory, and is written again by the next report or
                ``close``.
        """
        self._check_open()
        try:
            self._writer.wait()
        except SaveFailedError as error:
            self._raise_or_warn(error)

    @property
    def why_stop(self) -> str | None:
        """Why the loop should end, None when it should go on; derived from the reported history."""
        return self._why_stop

    # --- the inside of a report ---------------------------------------------------------------------------------

    def _note_metrics(self, values: Mapping[str, float]) -> None:
        """Take a report of the history into account."""
        self._last_metrics = values
        self._metric_warnings.note(values)
        if self._stopping is not None:
            self._stopping.report(values)
            self._why_stop = self._stopping.why

    def _ensure_started(self) -> None:
        if self._writer.started:
            return
        if self._resume != "never" and self._writer.exists:
            raise ConfigError(
                f"run {self.run!r} has checkpoints, and this training has not been restored from them: loop over "
                'ckpt.epochs(n) or ckpt.steps(n), or call ckpt.resume() before the loop, or pass resume="never"'
            )
        self.resume()

    def _save(self, moment: Manifest) -> Outcome:
        if moment.reasons:
            self._loop.note_generators()
        try:
            outcome = self._writer.save(moment, self._loop.position, self.why_stop)
        except SaveFailedError as error:
            if isinstance(error.outcome, Outcome):
                self._note_outcome(error.outcome)
            raise
        self._note_outcome(outcome)
        return outcome

    def _note_outcome(self, outcome: Outcome) -> None:
        self._why_stop = outcome.why_stop
        if outcome.saved:
            self._end.mark_saved()
