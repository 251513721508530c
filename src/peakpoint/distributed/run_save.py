"""The run side of a save: one rank holds the run while all of them write, and makes the checkpoint exist."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from peakpoint.errors import ConflictError
from peakpoint.format import layout
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.format.names import OWN_PARTS
from peakpoint.repository import journal as journals
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.reader import list_run
from peakpoint.repository.root import ensure_run
from peakpoint.repository.run import rules_of
from peakpoint.repository.run_audit import clean_run
from peakpoint.rules import ranking_metrics
from peakpoint.rules.record import lineage
from peakpoint.store import Store
from peakpoint.training.external import commit_external, hold_run, open_journal, record_report, state_image
from peakpoint.training.position import Position
from peakpoint.training.records import draft_manifest, last_sequence, with_free_name, written_by

_TOOL = "torch.distributed.checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveMoment:
    """What a user says of a save.

    Attributes:
        run: the run's name.
        step: optimizer steps completed.
        epoch: the epoch that is over, from 0; None outside epochs.
        metrics: of the moment.
        reason: why it is saved; protects it from rules.
    """

    run: str
    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    reason: str


class RunSave:
    """A save under way: the run is held, and a name for the checkpoint is taken.

    It follows the newest checkpoint that is no later than its step. Those after that become an abandoned branch, as
    when a training continues from an earlier checkpoint.

    Attributes:
        draft: the manifest but for parts and files.

    Raises:
        ConflictError: another process writes the run, or it is archived.
        StoreError: the store refused.
    """

    # of this process: one whose ranks have failed is told nothing, and lets go when the next one begins
    _begun: ClassVar[dict[tuple[str, str], "RunSave"]] = {}

    def __init__(self, store: Store, moment: SaveMoment) -> None:
        run, key = moment.run, (store.location, moment.run)
        if key in self._begun:
            self._begun[key].release()
        self._store, self._key, self._begin = store, key, time.perf_counter()
        by = written_by() | {"tool": _TOOL}
        with contextlib.ExitStack() as stack:
            now, self._hold = stack.enter_context(hold_run(store, run, utc_now))
            ensure_run(store, run, now, by, ())
            clean_run(store, run, now)
            events, manifests = journals.read(store, run).events, list_run(store, run).manifests
            in_force = rules_of(events)
            branch = {record.id for record in lineage(manifests)}
            earlier = [manifest for manifest in manifests if manifest.id in branch and manifest.step <= moment.step]
            origin = earlier[-1] if earlier else None
            newest, sequence = last_sequence(manifests, events), origin.sequence if origin else 0
            forks = origin.forks if origin else ()
            if newest > sequence:
                forks = (*forks, (sequence, newest + 1))
            report = origin.report + 1 if origin else 1
            next_epoch = 0 if moment.epoch is None else moment.epoch + 1
            self._position = Position(report, moment.step, moment.epoch, next_epoch, next_step=moment.step)
            draft = draft_manifest(
                run,
                newest + 1,
                self._position,
                moment.metrics,
                now,
                by,
                parent=origin.id if origin else None,
                forks=forks,
            )
            draft = replace(draft, reasons=(f"saved on request: {moment.reason}",), asked=moment.reason)
            preferred = [*(metric for metric, _ in ranking_metrics(in_force)), *moment.metrics]
            self.draft: Manifest = with_free_name(store, draft, preferred)
            # from here on a directory without a manifest is known to be an incomplete save
            texts = tuple(rule.text for rule in in_force)
            self._journal = stack.enter_context(open_journal(store, run, utc_now, by, texts, origin))
            self._stack = stack.pop_all()
        self._begun[key] = self

    def commit(
        self, trees: Mapping[str, Any], written: Mapping[str, Sequence[FileRecord]], optional: Sequence[str]
    ) -> None:
        """Make the checkpoint exist; durable on return. When it raises, it does not exist.

        Args:
            trees: of the parts.
            written: the files of all ranks by part.
            optional: parts that a training which continues need not have.

        Raises:
            ConflictError: the run was not held all the time, or a rank has written into another directory.
            StoreError: the store refused.
        """
        self._hold.check()
        files = [file for of_part in written.values() for file in of_part]
        for file in files:
            if self._store.size(layout.file_key(self.draft.run, self.draft.name, file.name)) != file.size:
                raise ConflictError(
                    f"{file.name}, which a rank has written, is not in {self._store.location}: every rank must see "
                    "the same directory there, on several hosts that of a network file system"
                )
        draft = replace(self.draft, parts=dict.fromkeys([*trees, *OWN_PARTS], ()))
        record_report(self._journal, draft.report, draft.step, draft.epoch, draft.metrics)
        seconds = time.perf_counter() - self._begin
        rates = {"write_seconds": seconds, "bytes_per_second": sum(file.size for file in files) / seconds}
        images = [state_image(trees, self._position, optional)]
        commit_external(
            self._store, self._journal, self._hold, draft, images, written=lambda: written, timing=lambda: rates
        )

    def release(self) -> None:
        """Let go of the run."""
        self._begun.pop(self._key, None)
        self._stack.close()
