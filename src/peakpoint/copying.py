"""Copying the state into the staging buffer, at once or while the training goes on.

Weights and optimizer state change in ``optimizer.step()`` and nowhere else, so their copy may run beside the next
forward and backward pass, if the next step waits for it. Everything else is copied at once. On CUDA the copies run on a
stream of their own and the training's stream waits for them, not the processor.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peakpoint.errors import Error

_CHUNK = 64 * 1024 * 1024  # how much is copied between two looks at the clock, the stream and the version counters


class ChangedError(Error):
    """A tensor changed while it was being copied, outside ``optimizer.step()``: the copy is of no moment."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor on its way into the buffer.

    Attributes:
        name: for errors.
        target: memory in the buffer.
        source: the live tensor.
        begin: where the target begins in the buffer.
    """

    name: str
    target: torch.Tensor
    source: torch.Tensor
    begin: int


def owned_storages(state: Iterable[Any]) -> set[tuple[torch.device, int]]:
    """The memory that changes only in ``step()`` of an optimizer in the state: its parameters and their moments."""
    owned: set[tuple[torch.device, int]] = set()
    for value in state:
        if isinstance(value, torch.optim.Optimizer):
            tensors = [parameter for group in value.param_groups for parameter in group["params"]]
            for moments in value.state.values():
                tensors += [moment for moment in moments.values() if isinstance(moment, torch.Tensor)]
            owned.update(_storage(tensor) for tensor in tensors)
    return owned


def _storage(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


class Copying:
    """One capture under way.

    On return of the constructor, everything that is not owned has been copied. Copies from a GPU into pinned memory are
    then on their way on a stream of their own, which the training's stream waits for where it must.

    Args:
        pieces: every tensor, in the order of the buffer.
        owned: memory that may be copied later; see ``owned_storages``.
        pinned: whether the buffer is pinned, so that a GPU can write to it by itself.
    """

    def __init__(self, pieces: Sequence[Piece], owned: set[tuple[torch.device, int]], *, pinned: bool = False) -> None:
        later = [piece for piece in pieces if owned and _storage(piece.source) in owned]
        apart = {id(piece) for piece in later}
        self._chunks = _chunks(later)
        self._versions = [(piece, _version(piece.source)) for piece in later]
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ready = 0  # everything before this byte of the buffer is final
        self._checked = False
        self._started = False
        self._streams = {device: _stream(device) for device in _cuda_devices(pieces)}
        self._arrivals: dict[int, torch.cuda.Event] = {}  # chunk number to the event after its copy from a GPU
        self.waited_seconds = 0.0
        self._copy_now([piece for piece in pieces if id(piece) not in apart])
        if pinned:
            self._send_later()
        if not later:
            self._ready, self._checked = _END, True

    def _copy_now(self, pieces: Sequence[Piece]) -> None:
        _copy_all([piece for piece in pieces if piece.source.device.type != "cuda"], non_blocking=False)
        for device, stream in self._streams.items():
            present = torch.cuda.current_stream(device)
            stream.wait_stream(present)
            with torch.cuda.stream(stream):
                _copy_all([piece for piece in pieces if piece.source.device == device], non_blocking=True)
            if not self._chunks:
                stream.synchronize()
            present.wait_stream(stream)  # the training may change these as soon as they are copied, and not before
        self._sent = [_event(stream) for stream in self._streams.values()]

    def _send_later(self) -> None:
        """Put the copies from GPUs on their streams, chunk by chunk."""
        for number, chunk in enumerate(self._chunks):
            device = chunk[0].source.device
            if device in self._streams:
                with torch.cuda.stream(self._streams[device]):
                    _copy_all(chunk, non_blocking=True)
                self._arrivals[number] = _event(self._streams[device])

    def run(self) -> None:
        """Copy what may be copied later, in a thread of its own; the second call does nothing."""
        if self._started:
            return
        self._started = True
        try:
            for event in self._sent:
                event.synchronize()
            for number, chunk in enumerate(self._chunks):
                self._advance(chunk[0].begin)
                if number in self._arrivals:
                    self._arrivals[number].synchronize()
                else:
                    self._copy_chunk(chunk)
            self._check_versions()
            self._advance(_END)
        except BaseException as error:  # noqa: BLE001 - the end of a thread: whoever waits raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _copy_chunk(self, chunk: Sequence[Piece]) -> None:
        stream = self._streams.get(chunk[0].source.device)
        if stream is None:
            _copy_all(chunk, non_blocking=False)
            return
        with torch.cuda.stream(stream):
            _copy_all(chunk, non_blocking=False)
        stream.synchronize()

    def _check_versions(self) -> None:
        """Look whether a tensor has changed since the capture; once, and before the optimizer's step changes them."""
        with self._changed:
            if self._checked:
                return
            self._checked = True
            for piece, version in self._versions:
                if _version(piece.source) != version:
                    self._error = ChangedError(
                        f"tensor {piece.name!r} changed outside optimizer.step() while it was being copied; change "
                        "weights in step(), or pass overlap=False so that report() copies everything before it returns"
                    )
                    self._changed.notify_all()
                    return

    def _advance(self, ready: int) -> None:
        with self._changed:
            self._ready = max(self._ready, ready)
            self._changed.notify_all()

    def wait(self, position: int | None = None) -> None:
        """Return when everything before ``position`` of the buffer is final; everything by default.

        Raises:
            ChangedError: a tensor changed while it was being copied.
        """
        wanted = _END if position is None else position
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._ready >= wanted)
            if self._error is not None:
                raise self._error

    def hold_step(self) -> None:
        """The optimizer is about to step: return when it may, and count the time.

        What a GPU copies by itself is waited for by its stream and not by the processor.
        """
        begin = time.perf_counter()
        if self._chunks and len(self._arrivals) == len(self._chunks):
            for device, stream in self._streams.items():
                torch.cuda.current_stream(device).wait_stream(stream)
            self._check_versions()
        else:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None or self._ready == _END)
        self.waited_seconds += time.perf_counter() - begin


_END = 1 << 62


def _chunks(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces in order, grouped by device up to ``_CHUNK`` bytes; large ones are cut so that the writer can follow."""
    chunks: list[list[Piece]] = []
    size = 0
    for piece in (part for whole in pieces for part in _parts(whole)):
        full = size + piece.target.nbytes > _CHUNK
        if not chunks or full or chunks[-1][0].source.device != piece.source.device:
            chunks.append([])
            size = 0
        chunks[-1].append(piece)
        size += piece.target.nbytes
    return chunks


def _parts(piece: Piece) -> list[Piece]:
    plain = piece.source.is_contiguous() and not piece.source.is_conj() and not piece.source.is_neg()
    if piece.target.nbytes <= _CHUNK or not plain:
        return [piece]
    step = _CHUNK // piece.target.itemsize
    target, source = piece.target.view(-1), piece.source.view(-1)
    return [
        Piece(piece.name, target[at : at + step], source[at : at + step], piece.begin + at * target.itemsize)
        for at in range(0, target.numel(), step)
    ]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - there is no other way to see a change


def _cuda_devices(pieces: Sequence[Piece]) -> list[torch.device]:
    return sorted({piece.source.device for piece in pieces if piece.source.device.type == "cuda"}, key=str)


@torch.no_grad()
def _copy_all(pieces: Sequence[Piece], *, non_blocking: bool) -> None:
    if pieces:
        targets, sources = [piece.target for piece in pieces], [piece.source for piece in pieces]
        torch._foreach_copy_(targets, sources, non_blocking=non_blocking)  # one call for all; the public way is a loop


class StepGuard:
    """Hooks that let no optimizer in the state step before the copy under way is complete.

    Args:
        state: the parts of the state.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._copying: Copying | None = None
        self._last: Copying | None = None
        optimizers = [value for value in state.values() if isinstance(value, torch.optim.Optimizer)]
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def _before_step(self, *_: object) -> None:
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.hold_step()

    def watch(self, copying: Copying) -> None:
        """Hold the next step until ``copying`` is complete."""
        self._copying = self._last = copying

    @property
    def waited_seconds(self) -> float:
        """How long optimizers have waited for the copying that was watched last."""
        return 0.0 if self._last is None else self._last.waited_seconds

    def stop(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
