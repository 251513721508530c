"""The saves of the ranks other than 0, where tensors are divided: each writes its shards beside the training."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peakpoint.errors import Error
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.repository.commit import put_files
from peakpoint.state.capture import CapturedState, StateEncoder, capture_shards
from peakpoint.state.host_copy import NO_STORAGE
from peakpoint.state.step_guard import StepGuard
from peakpoint.state.streamed_copy import RingBuffer
from peakpoint.state.tensor_files import StagingBuffer
from peakpoint.store import Store
from peakpoint.store.threads import start_thread
from peakpoint.training.ranks import Ranks

Records = Mapping[str, Sequence[FileRecord]]  # by part


class ShardWriter:
    """Writes the shards of one rank to checkpoints that rank 0 commits."""

    def __init__(
        self,
        ranks: Ranks,
        store: Store,
        state: Mapping[str, Any],
        encoder: StateEncoder,
        buffer: StagingBuffer | RingBuffer,
        guard: StepGuard,
        *,
        overlap: bool,
    ) -> None:
        self._ranks, self._store, self._state, self._encoder = ranks, store, state, encoder
        self._buffer, self._guard, self._overlap = buffer, guard, overlap
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._captured: CapturedState | Exception | None = None
        self._previous: Manifest | None = None  # this rank's part of it

    def inherit(self, manifest: Manifest) -> None:
        """Go on from a checkpoint that the state has been restored from; see ``StateEncoder.inherit``."""
        self._encoder.inherit(manifest)
        self._previous = manifest

    def capture(self) -> None:
        """Copy the shards of this moment, but for what optimizers own, when the save before has been written.

        An error of that is rank 0's to raise, when it has heard of it.

        Raises:
            ConflictError: rank 0 has ended during the save before.
        """
        self.wait()
        stepped = self._guard.owned()
        owned = stepped if self._overlap else NO_STORAGE
        try:
            self._captured = capture_shards(self._state, self._encoder, self._buffer, owned, stepped)
        except Exception as error:  # noqa: BLE001 - it is sent
            self._captured = error

    def write(self, draft: Manifest) -> None:
        """Begin to write what was captured to the checkpoint that ``draft`` names."""
        captured = self._captured
        assert captured is not None
        self._thread = threading.Thread(target=self._work, args=(draft, captured), name=f"peakpoint-save-{draft.run}")
        self._thread.start()
        if isinstance(captured, Exception):
            return
        self._guard.watch(captured.copying)
        if isinstance(self._buffer, RingBuffer):
            captured.copying.wait()

    def wait(self) -> None:
        """Return when the save under way has been written, and rank 0 been told so."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self, draft: Manifest, captured: CapturedState | Exception) -> None:
        message: Records | Error
        try:
            message = self._write(draft, captured) if isinstance(captured, CapturedState) else Error(repr(captured))
        except Error as error:
            message = error
        except Exception as error:  # noqa: BLE001 - the end of a thread: whatever it was, rank 0 raises it
            message = Error(repr(error))
        try:
            self._ranks.send_records(message)
        except Error as error:
            self._error = error

    def _write(self, draft: Manifest, captured: CapturedState) -> Records:
        copier = start_thread(captured.copying.run, f"peakpoint-copy-{draft.run}")
        if copier is None:
            captured.copying.run()
        try:
            files = put_files(self._store, draft, captured.images, self._previous)
            captured.copying.settle()
        except BaseException:
            captured.copying.abandon()
            raise
        finally:
            if copier is not None:
                copier.join()
        self._previous = replace(draft, files=files, parts=captured.parts)
        captured.committed(self._previous)
        return {part: [*map(self._previous.file, names)] for part, names in captured.parts.items()}


class RecordsOfOthers:
    """What the other ranks write in one save, received once; rank 0 calls it in its background thread.

    It is called also where the save has failed on rank 0: the others must not wait for that, nor write to the directory
    when it has been cleared.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._messages: list[Any] | None = None

    def __call__(self) -> Records:
        """Return the files by part.

        Raises:
            Error: one of them has failed; its error.
            ConflictError: one of them has ended, or takes too long.
        """
        if self._messages is None:
            self._messages = []
            self._messages = self._ranks.receive_records()
        for rank, message in enumerate(self._messages, 1):
            if isinstance(message, Error):
                message.rank = rank
                raise message
        return {
            part: [file for records in self._messages for file in records.get(part, ())]
            for part in dict.fromkeys(part for records in self._messages for part in records)
        }
