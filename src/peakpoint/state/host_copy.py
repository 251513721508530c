"""The copy of the state into the staging buffer, at once or while the training goes on.

Weights and optimizer state change in ``optimizer.step()`` and nowhere else, so their copy may run beside the next
forward and backward pass, if the next step waits for it. Everything else is copied at once. On CUDA the copies run on a
stream of their own and the training's stream waits for them, not the processor.
"""

import contextlib
import mmap
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from peakpoint.errors import Error, PeakpointWarning
from peakpoint.state.samples import SMALL, Samples, can_sample
from peakpoint.store.pages import address

_CHUNK = 64 * 1024 * 1024  # bytes copied between two looks at the clock, the stream and the version counters


class ChangedError(Error):
    """A tensor changed while it was being copied, outside ``optimizer.step()``: the copy mixes two states."""


@dataclass(frozen=True, slots=True)
class CopyTarget:
    """The place of one tensor in the buffer.

    Attributes:
        name: for errors.
        memory: of the tensor's dtype and shape.
        begin: where it begins in the buffer.
    """

    name: str
    memory: torch.Tensor
    begin: int


Storage = tuple[torch.device, int]
NO_STORAGE: frozenset[Storage] = frozenset()


def storage_of(tensor: torch.Tensor) -> Storage:
    """Return the memory that a tensor is in."""
    return tensor.device, tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, slots=True)
class CopyChunk:
    """Tensors of one device, or a piece of a large one, that are copied in one go.

    Attributes:
        begin: where they begin in the buffer.
        targets: memory in the buffer.
        sources: the number of each source, and for a piece of one its first and last element.
    """

    device: torch.device
    begin: int
    targets: list[torch.Tensor]
    sources: list[tuple[int, int, int] | int]

    def pick(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sources out of all tensors."""
        return [
            tensors[source] if isinstance(source, int) else tensors[source[0]].view(-1)[source[1] : source[2]]
            for source in self.sources
        ]


class CopyPlan:
    """The tensors that are copied at once, and those that are copied later; good as long as no tensor moves.

    Args:
        targets: where each tensor goes, in the order of the buffer.
        sources: the tensors, in the same order.
        owned: memory that may be copied later; see ``StepGuard.owned``.
    """

    def __init__(
        self, targets: Sequence[CopyTarget], sources: Sequence[torch.Tensor], owned: Collection[Storage]
    ) -> None:
        self.later = [
            number
            for number, source in enumerate(sources)
            if source.nbytes > SMALL and owned and storage_of(source) in owned and can_sample(source)
        ]
        self.later_names = [targets[number].name for number in self.later]
        self._copies = [targets[number].memory for number in self.later]
        self._samples = Samples(self.pick(sources))
        at_once = set(range(len(sources))) - set(self.later)
        self.chunks_later = _chunks(targets, sources, self.later)
        self.chunks_now = _chunks(targets, sources, sorted(at_once, key=lambda number: str(sources[number].device)))
        self.devices = sorted({source.device for source in sources if source.device.type == "cuda"}, key=str)

    def pick(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors that are copied later."""
        return [sources[number] for number in self.later]

    def sample(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Take samples of the tensors that are copied later; on CUDA on the current stream."""
        return self._samples.take(self.pick(sources))

    def sample_copies(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Take samples of their copies."""
        return self._samples.take_copies(self.pick(sources), self._copies)

    def differing(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> str | None:
        """Return the name of a tensor whose samples differ."""
        number = self._samples.differing(first, second)
        return None if number is None else self.later_names[number]


class HostCopy:
    """One capture under way.

    On return of the constructor, everything that is not owned has been copied. Copies from a GPU into pinned memory are
    then on their way on a stream of their own, which the training's stream waits for where it must.

    Args:
        sources: the tensors that the plan was made for.
        pinned: whether the buffer is pinned, so that a GPU can write to it by itself.
    """

    def __init__(self, plan: CopyPlan, sources: Sequence[torch.Tensor], *, pinned: bool = False) -> None:
        self._plan = plan
        self._sources: Sequence[torch.Tensor] = sources
        self._first_samples: list[torch.Tensor] = []
        self._late_samples: list[torch.Tensor] = []  # of the time when no copy can be at work any more
        self._chunks = plan.chunks_later
        self._versions = versions_of(plan.pick(sources))
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ready = 0  # everything before this byte of the buffer is final
        self._checked = False
        self._settled = threading.Event()
        self._ended = 0.0
        self._began = time.perf_counter()
        self._started = False
        self._streams = {device: torch.cuda.Stream(device) for device in plan.devices}  # type: ignore[no-untyped-call]
        self._arrivals: dict[int, torch.cuda.Event] = {}  # chunk number to the event after its copy from a GPU
        self.waited_seconds = 0.0
        self._copy_now()
        if pinned:
            self._send_later()
        if not self._chunks:
            self._ready, self._checked = END, True
            self._settled.set()

    def _copy_now(self) -> None:
        for chunk in self._plan.chunks_now:
            if chunk.device not in self._streams:
                _copy_all(chunk, self._sources, non_blocking=False)
        self._first_samples = self._sample()
        for device, stream in self._streams.items():
            training_stream = torch.cuda.current_stream(device)
            with torch.cuda.stream(stream):
                for chunk in self._plan.chunks_now:
                    if chunk.device == device:
                        _copy_all(chunk, self._sources, non_blocking=True)
            if not self._chunks:
                stream.synchronize()
            # the training may change these as soon as they are copied, and not before
            training_stream.wait_stream(stream)
        self._sent = [_event(stream) for stream in self._streams.values()]

    def _sample(self) -> list[torch.Tensor]:
        """Take samples of what is copied later, after all GPU work queued so far; the processor does not wait."""
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        with self._beside():
            return self._plan.sample(self._sources)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Let GPUs work on the streams of the copy."""
        with contextlib.ExitStack() as stack:
            for stream in self._streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def _send_later(self) -> None:
        """Put the copies from GPUs on their streams, chunk by chunk."""
        for number, chunk in enumerate(self._chunks):
            if chunk.device in self._streams:
                with torch.cuda.stream(self._streams[chunk.device]):
                    _copy_all(chunk, self._sources, non_blocking=True)
                self._arrivals[number] = _event(self._streams[chunk.device])

    def run(self) -> None:
        """Copy the rest, in a thread of its own; the second call does nothing."""
        if self._started:
            return
        self._started = True
        try:
            for event in self._sent:
                event.synchronize()
            for number, chunk in enumerate(self._chunks):
                self._advance(chunk.begin)
                if number in self._arrivals:
                    self._arrivals[number].synchronize()
                else:
                    self._copy_chunk(chunk)
            self._check_versions()
            self._ended = time.perf_counter()
            self._advance(END)
        except BaseException as error:  # noqa: BLE001 - the end of a thread: whoever waits raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._sources = ()
            self._settled.set()

    def settle(self) -> None:
        """Return when it is certain that no tensor changed during the copy; before this the copy does not count.

        A version counter moves when an operation on the tensor ends, which may be after the end of the copy. The
        counters are compared when the next step begins, since no other operation runs then, or else after twice the
        time that the copy took. Changes that no counter shows are found by samples: those of that time and those of the
        copy are compared with those of the capture.

        Raises:
            ChangedError: a tensor changed while it was being copied, or right after that.
        """
        self.wait()
        delay = max(_GRACE, 2 * (self._ended - self._began))
        self._settled.wait(max(0.0, self._ended + delay - time.perf_counter()))
        self._settle()
        with self._changed, self._beside():
            if self._sources and self._error is None:
                first, copies = self._first_samples, self._plan.sample_copies(self._sources)
                self._refuse(self._plan.differing(first, self._late_samples) or self._plan.differing(first, copies))
        self._sources = ()  # what the training lets go of is not kept alive by its last save
        self.wait()

    def _settle(self) -> None:
        """Compare the counters a second time, once; samples are taken now, and compared by ``settle``."""
        with self._changed:
            if not self._settled.is_set():
                self._compare()
                self._late_samples = self._sample()
                self._settled.set()

    def _copy_chunk(self, chunk: CopyChunk) -> None:
        stream = self._streams.get(chunk.device)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            _copy_all(chunk, self._sources, non_blocking=False)
        if stream is not None:
            stream.synchronize()

    def _check_versions(self) -> None:
        """Compare the counters with those of the capture; once, and before the optimizer's step moves them."""
        with self._changed:
            if self._checked:
                return
            self._checked = True
            self._compare()

    def _compare(self) -> None:
        versions = versions_of(self._plan.pick(self._sources))
        compared = zip(self._plan.later_names, versions, self._versions, strict=True)
        self._refuse(next((name for name, version, captured in compared if version != captured), None))

    def _refuse(self, name: str | None) -> None:
        if name is not None:
            self._error = ChangedError(
                f"tensor {name!r} changed outside optimizer.step() while it was being copied, or right after that; "
                "change weights in step(), or pass overlap=False so that report() copies everything before it returns"
            )
            self._changed.notify_all()

    def _advance(self, ready: int) -> None:
        with self._changed:
            self._ready = max(self._ready, ready)
            self._changed.notify_all()

    def wait(self, position: int | None = None) -> None:
        """Return when everything before ``position`` of the buffer is final; everything by default.

        Raises:
            ChangedError: a tensor changed while it was being copied.
        """
        needed_bytes = END if position is None else position
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._ready >= needed_bytes)
            if self._error is not None:
                raise self._error

    def abandon(self) -> None:
        """Do nothing: after a failed save the copy is finished all the same, to be written later."""

    def hold_step(self) -> None:
        """Return when the optimizer may step, and count the time that it waited.

        What a GPU copies by itself is waited for by its stream and not by the processor.
        """
        begin = time.perf_counter()
        if self._chunks and len(self._arrivals) == len(self._chunks):
            self._check_versions()
            self._settle()
            for device, stream in self._streams.items():
                torch.cuda.current_stream(device).wait_stream(stream)
        else:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None or self._ready == END)
            self._settle()
        self.waited_seconds += time.perf_counter() - begin


END = 1 << 62
_GRACE = 0.02  # seconds: longer than a small operation takes, with the threads that it waits for


def _chunks(targets: Sequence[CopyTarget], sources: Sequence[torch.Tensor], numbers: Sequence[int]) -> list[CopyChunk]:
    """Group tensors in order, by device up to ``_CHUNK`` bytes; large ones are cut so that the writer can follow."""
    chunks: list[CopyChunk] = []
    size = 0
    for number in numbers:
        target, source = targets[number], sources[number]
        for begin, memory, pick in _cut(target, source, number):
            if not chunks or size + memory.nbytes > _CHUNK or chunks[-1].device != source.device:
                chunks.append(CopyChunk(source.device, begin, [], []))
                size = 0
            chunks[-1].targets.append(memory)
            chunks[-1].sources.append(pick)
            size += memory.nbytes
    return chunks


def _cut(
    target: CopyTarget, source: torch.Tensor, number: int
) -> Iterator[tuple[int, torch.Tensor, tuple[int, int, int] | int]]:
    plain = source.is_contiguous() and not source.is_conj() and not source.is_neg()
    if target.memory.nbytes <= _CHUNK or not plain:
        yield target.begin, target.memory, number
        return
    flat, width = target.memory.view(-1), target.memory.itemsize
    step = _CHUNK // width
    for begin in range(0, flat.numel(), step):
        end = min(begin + step, flat.numel())
        yield target.begin + begin * width, flat[begin:end], (number, begin, end)


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def versions_of(tensors: Collection[torch.Tensor]) -> list[int]:
    """Return how often torch has counted a write to each tensor; -1 for inference tensors, which have no counter."""
    try:
        return [tensor._version for tensor in tensors]  # noqa: SLF001 - there is no other way to see a change
    except RuntimeError:  # an inference tensor among them
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]  # noqa: SLF001


@torch.no_grad()
def _copy_all(chunk: CopyChunk, tensors: Sequence[torch.Tensor], *, non_blocking: bool) -> None:
    # one call for all of them; the public way is a loop
    torch._foreach_copy_(chunk.targets, chunk.pick(tensors), non_blocking=non_blocking)


def pin(data: mmap.mmap | memoryview) -> bool:
    """Lock memory for CUDA, so that copies from and to the GPU run beside the training.

    Our own pages are registered instead of using CUDA's: direct I/O refuses memory that a driver has mapped. Where the
    system does not allow so much locked memory, copies are correct all the same, and slower.

    Returns:
        Whether it is locked.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(address(data), len(data), 0))
    if code != 0:
        warnings.warn(
            f"CUDA could not pin {len(data) / 1e6:.0f} MB (error {code}; see ulimit -l): copies are slower",
            PeakpointWarning,
            stacklevel=2,
        )
    return code == 0


def unpin(data: mmap.mmap | memoryview) -> None:
    """Undo ``pin``, before the memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(address(data))  # type: ignore[no-untyped-call]
