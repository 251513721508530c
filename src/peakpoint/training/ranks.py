"""The ranks of a training of several processes: what each knows is shared, what the first one decides holds for all.

Messages are few and small. They go point to point through rank 0, so that an error can name the rank that did not come,
over a group of our own: nothing of ours runs between the collectives of the training.
"""

import copy
import itertools
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from peakpoint.errors import ConfigError, ConflictError, Error
from peakpoint.training.outcome import warn

Result = TypeVar("Result")

_TIME_LIMIT = timedelta(minutes=30)  # torch's own for groups on the CPU
_WHOLE_SAVE = timedelta(days=1)  # who has died is noticed at once, by its connections
_MEETINGS = 4  # in the time limit, while some work takes long
_FRAME = 4096  # bytes of every message; a longer one has a second piece
_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
_numbers = itertools.count()  # of the groups of this process


@dataclass(frozen=True, slots=True)
class _Message:
    """What the work of one rank has made, or how it failed.

    Attributes:
        call: the method that did it: all ranks call the same methods in the same order.
    """

    call: str
    result: Any = None
    error: Error | None = None


class Ranks:
    """The processes of a training, as one of them sees them; a single one where torch.distributed is not used.

    Every rank makes one, and calls its methods in the same order. An error that some work raises on one rank is raised
    on all: there its attribute ``rank`` says where it comes from.

    Args:
        run: the name of the run that they write.

    Raises:
        ConfigError: the ranks name different runs.
        ConflictError: a rank has not come within the time limit of the training's group; the message names it.
    """

    def __init__(self, run: str) -> None:
        self.rank, self.size = 0, 1
        self._group: distributed.ProcessGroup | None = None
        self._background: distributed.ProcessGroup | None = None
        if "TORCHELASTIC_RUN_ID" in os.environ and (advice := rank_advice()):
            warn(f"{advice}. Without that each process trains by itself, and whoever comes second is refused")
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._time_limit = _time_limit()
        names = self._meet(run)
        differing = next((rank for rank, name in enumerate(names) if name != names[0]), None)
        if differing is not None:
            raise ConfigError(
                f"the ranks of a training write one run, and rank 0 calls it {names[0]!r}, rank {differing} "
                f"{names[differing]!r}: give the same name on every rank"
            )
        self._group = distributed.new_group(backend="gloo", timeout=self._time_limit)

    def _meet(self, run: str) -> list[str]:
        """Wait for all ranks; returns the runs that they name. A new group would not say which rank is missing."""
        store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public way to it
        number = next(_numbers)
        keys = [f"peakpoint/{number}/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], run)
        try:
            store.wait(keys, self._time_limit)
        except RuntimeError as error:
            absent = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
            raise ConflictError(
                f"this training has {self.size} ranks, and rank {absent} made no Checkpointer within "
                f"{self._time_limit}: make one on every rank, with the same arguments. It is rank 0 that writes"
            ) from error
        return [store.get(key).decode() for key in keys]

    @property
    def can_meet(self) -> bool:
        """Whether the ranks can reach each other: the training has not ended torch.distributed."""
        return self._group is None or distributed.is_initialized()

    def share(self, call: str, work: Callable[[], Result], *, only_first: bool = False) -> Sequence[Result]:
        """Do some work on every rank.

        Args:
            call: the method of the user's, for errors.
            only_first: rank 0 alone gets the results.

        Returns:
            What it has made on each rank.

        Raises:
            ConflictError: a rank has ended, takes too long, or makes another call.
        """
        if self._group is None:
            return [work()]
        self._check_can_meet(call)
        message, failure = _attempt(call, work)
        if self.rank == 0:
            messages = [message, *(self._receive(call, rank) for rank in range(1, self.size))]
            answer = [replace(sent, result=None) for sent in messages] if only_first else messages
            for rank in range(1, self.size):
                self._send(call, answer, rank)
        else:
            self._send(call, message, 0)
            received = self._receive(call, 0)
            messages = received if isinstance(received, list) else [received]
        self._check_calls(call, messages)
        if failure is not None:
            raise failure
        for rank, sent in enumerate(messages):
            _raise_error(rank, sent)
        return [sent.result for sent in messages]

    def lead(self, call: str, work: Callable[[], Result]) -> Result:
        """Do some work on rank 0 only; returns what it has made on every rank."""
        if self._group is None:
            return work()
        self._check_can_meet(call)
        if self.rank:
            message = self._receive(call, 0)
            self._check_calls(call, [message] if isinstance(message, _Message) else message)
            _raise_error(0, message)
        else:
            message, failure = _attempt(call, work)
            try:
                for rank in range(1, self.size):
                    self._send(call, message, rank)
            except ConflictError:
                if failure is None:
                    raise
            if failure is not None:
                raise failure
        return cast("Result", message.result)

    def share_long(self, call: str, work: Callable[[], Result]) -> Sequence[Result]:
        """Do some work on every rank that may take longer than the time limit: the ranks meet now and then meanwhile.

        See ``share``.
        """
        if self._group is None:
            return [work()]
        with ThreadPoolExecutor(1, "peakpoint-ranks") as executor:
            future = executor.submit(work)
            while not all(self.share(call, lambda: self._ends_soon(future))):
                pass
            return self.share(call, future.result)

    def _ends_soon(self, future: "Future[Any]") -> bool:
        return not wait([future], self._time_limit.total_seconds() / _MEETINGS).not_done

    def _check_can_meet(self, call: str) -> None:
        if not self.can_meet:
            raise ConflictError(
                f"{call}() of the Checkpointer comes after torch.distributed.destroy_process_group(), and the ranks "
                "cannot reach each other any more: end the group at the end of the script"
            )

    def _check_calls(self, call: str, messages: Sequence[_Message]) -> None:
        for rank, message in enumerate(messages):
            if message.call != call:
                raise ConflictError(
                    f"rank {rank} calls {message.call}() where rank {self.rank} calls {call}(): every rank makes the "
                    "same calls of its Checkpointer in the same order"
                )

    def open_background(self) -> None:
        """Make the group for ``send_records`` and ``receive_records``; called on every rank."""
        self._background = distributed.new_group(backend="gloo", timeout=_WHOLE_SAVE)

    def send_records(self, records: object) -> None:
        """Send to rank 0 what a background thread of this rank has written, or the error that kept it from that."""
        self._send("save", records, 0, self._background)

    def receive_records(self) -> list[Any]:
        """Return what the background threads of all other ranks send; on rank 0, in its background thread."""
        return [self._receive("save", rank, self._background) for rank in range(1, self.size)]

    def _send(self, call: str, message: object, rank: int, group: "distributed.ProcessGroup | None" = None) -> None:
        group = group or self._group
        data = pickle.dumps(message)
        frame = (len(data).to_bytes(8) + data).ljust(_FRAME, b"\0")
        try:
            for piece in filter(None, (frame[:_FRAME], frame[_FRAME:])):
                distributed.send(torch.frombuffer(bytearray(piece), dtype=torch.uint8), rank, group=group)
        except RuntimeError as error:
            raise self._gone(call, rank, error) from error

    def _receive(self, call: str, rank: int, group: "distributed.ProcessGroup | None" = None) -> Any:
        group = group or self._group
        frame = torch.empty(_FRAME, dtype=torch.uint8)
        try:
            distributed.recv(frame, rank, group=group)
            size = int.from_bytes(frame[:8].numpy().tobytes())
            second = torch.empty(max(0, 8 + size - _FRAME), dtype=torch.uint8)
            if len(second):
                distributed.recv(second, rank, group=group)
        except RuntimeError as error:
            raise self._gone(call, rank, error) from error
        data = frame.numpy().tobytes() + second.numpy().tobytes()
        return pickle.loads(data[8 : 8 + size])  # noqa: S301 - from a process of the same training

    def _gone(self, call: str, rank: int, error: RuntimeError) -> ConflictError:
        has_ended = any(word in str(error).lower() for word in ("closed", "reset"))
        why = (
            "its process has ended, or has left its Checkpointer"
            if has_ended
            else f"it takes longer than {self._time_limit}; init_process_group(timeout=...) sets that time"
        )
        return ConflictError(
            f"rank {rank} of {self.size} did not come to {call}() of its Checkpointer, as rank {self.rank} has: {why}"
        )

    def close(self) -> None:
        """Let go of the groups."""
        groups = [self._group, self._background]
        self._group = self._background = None
        for group in groups:
            if group is not None and distributed.is_initialized():
                distributed.destroy_process_group(group)


def _time_limit() -> timedelta:
    """Return how long the training's own group waits."""
    world = distributed.group.WORLD
    for device in ("cuda", "cpu"):
        try:
            options = cast("Any", world)._get_backend(torch.device(device)).options  # noqa: SLF001 - see _meet
        except (AttributeError, RuntimeError):  # another device, another release
            continue
        return cast("timedelta", options._timeout)  # noqa: SLF001
    return _TIME_LIMIT


def _attempt(call: str, work: Callable[[], object]) -> tuple[_Message, Exception | None]:
    try:
        message = _Message(call, work())
        pickle.dumps(message)  # what cannot be sent is an error of this rank
    except Error as error:
        return _Message(call, error=error), error
    except Exception as error:  # noqa: BLE001 - the other ranks are waiting; it is raised again
        return _Message(call, error=Error(repr(error))), error
    return message, None


def _raise_error(rank: int, message: _Message) -> None:
    if message.error is not None:
        error = copy.copy(message.error)
        error.rank = rank
        raise error


def rank_advice() -> str:
    """Return what to do where every rank makes a checkpointer by itself; nothing when this process is the only one."""
    texts = [(os.environ.get(rank, ""), os.environ.get(size, "")) for rank, size in _VARIABLES]
    ranks = [(int(rank), int(size)) for rank, size in texts if rank.isdecimal() and size.isdecimal()]
    rank, size = next((pair for pair in ranks if pair[1] > 1), (0, 1))
    if size == 1 or (distributed.is_available() and distributed.is_initialized()):
        return ""
    return (
        f"this process is rank {rank} of {size}, and torch.distributed is not in use: call "
        "torch.distributed.init_process_group() before Checkpointer(...), and the ranks write one run together"
    )
