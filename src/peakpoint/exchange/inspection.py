"""Files of strangers are read in another process first, which may take only so much memory and time.

No list of checks closes the ways in which a few bytes can ask for gigabytes, for hours, or for more stack than there
is: the hash of a deep tuple, a memo of 2**31 places, views of views. Whatever such a file does, it does to the process
that inspects it, and this one says which file it was. What the other process could read within its limits this one can
read, too: it gets the moment and the names of the parts from there, and reads tensors only when it writes them.

One process serves all files of an import; after it has died of one, another goes on with the next.
"""

import base64
import os
import resource
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from peakpoint import errors
from peakpoint.exchange import metric_logs
from peakpoint.exchange.metric_logs import LogRow, readable
from peakpoint.exchange.sources import CheckpointSource, check_regular, read
from peakpoint.exchange.state_dicts import ForeignCheckpoint, ReadOptions, storable
from peakpoint.production.subprocess_runner import Ends, run_apart
from peakpoint.state.tensor_files import is_possible
from peakpoint.state.typed_json import Encoder

_SPARE_BYTES, _TIMES_SIZE = 1 << 29, 6  # memory for a file: so much, and so many times its size
_SPARE_SECONDS, _BYTES_A_SECOND = 20, 1_000_000  # processor time for a file; pickles of small objects take the longest
_WAIT = 5  # seconds on the clock for one of processor time: other work, a slow disk
_START_SECONDS = 300  # for the interpreter and torch, on a machine that has much else to do
_LOG = "log"
_STACK_BYTES = 1 << 22  # half of what a main thread has: what fits here fits there


@dataclass(frozen=True, slots=True)
class InspectionJob:
    """What another process inspects: sources of checkpoints, or of logs."""

    sources: tuple[CheckpointSource, ...]
    options: ReadOptions


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a source holds, without tensors and other values, or why it was refused.

    Attributes:
        refusal: the name of an error, and its text.
    """

    checkpoint: ForeignCheckpoint | None = None
    rows: tuple[LogRow, ...] = ()
    refusal: tuple[str, str] | None = None

    def error(self) -> errors.Error | None:
        """Return the error that reading it raises."""
        return None if self.refusal is None else getattr(errors, self.refusal[0])(self.refusal[1])


def log_source(path: Path) -> CheckpointSource:
    """Return a log, or a folder of TensorBoard, as a source to be inspected.

    Raises:
        FormatError: it is a pipe or a device.
    """
    children = (path, *(path.rglob("*") if path.is_dir() else ()))
    for child in children:
        check_regular(child)
    return CheckpointSource(path=path, kind=_LOG, files=tuple(child for child in children if child.is_file()))


def inspect(sources: Sequence[CheckpointSource], options: ReadOptions, *, all_of_them: bool) -> list[Inspected]:
    """Read sources in another process, and return what they hold, in order.

    Args:
        all_of_them: go on after one that is refused; otherwise it is the last of the list.
    """
    inspected: list[Inspected] = []
    while len(inspected) < len(sources) and (all_of_them or not inspected or inspected[-1].refusal is None):
        inspected += _inspect(sources[len(inspected) :], options, all_of_them=all_of_them)
    return inspected


def _inspect(sources: Sequence[CheckpointSource], options: ReadOptions, *, all_of_them: bool) -> list[Inspected]:
    inspected: list[Inspected] = []
    printed = bytearray()

    def take_line(line: bytes) -> bool:
        inspected.append(_unpack(line, Inspected))
        return len(inspected) == len(sources) or (inspected[-1].refusal is not None and not all_of_them)

    def add_output(text: bytes) -> None:
        printed.extend(text)
        del printed[:-10_000]

    job = _pack(InspectionJob(tuple(sources), options))
    timeout = _START_SECONDS + _WAIT * sum(_seconds(source) for source in sources)
    end = run_apart(__name__, job, timeout=timeout, on_line=take_line, on_output=add_output)
    if end is not None:
        path = sources[len(inspected)].path
        last_line = printed.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
        how = last_line if "exit code" in end and last_line else end
        how = "it took more time than a file of its size may" if "SIGXCPU" in end else how
        text = f"{path} was refused when it was read in a process of its own: {how}. It is damaged, or means harm"
        inspected.append(Inspected(refusal=("CorruptError", text)))
    return inspected


def _seconds(source: CheckpointSource) -> int:
    return _SPARE_SECONDS + source.size_bytes // _BYTES_A_SECOND


def _pack(message: InspectionJob | Inspected) -> bytes:
    return base64.b64encode(msgspec.msgpack.encode(message, enc_hook=os.fsencode))  # JSON has no NaN


def _unpack(line: bytes, kind: type[Any]) -> Any:
    return msgspec.msgpack.decode(
        base64.b64decode(line), type=kind, dec_hook=lambda _, name: Path(os.fsdecode(name)), strict=False
    )


# --- in the other process -----------------------------------------------------------------------------------------


def main(ends: list[Any]) -> None:
    """Inspect the sources of the job that is given, and send what each holds as a line."""
    pipes = Ends(ends)
    job: InspectionJob = _unpack(pipes.job(), InspectionJob)
    torch.set_num_threads(1)  # of each thread the stack counts as memory
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    with ThreadPoolExecutor(1) as thread:
        for source in job.sources:
            pipes.send(_pack(thread.submit(_inspected, source, job.options).result()))


def _inspected(source: CheckpointSource, options: ReadOptions) -> Inspected:
    try:
        if source.kind == _LOG:
            metric_logs.import_reader(source.path)  # the modules are not what the file takes
            _limit(source)
            return Inspected(rows=tuple(metric_logs.read(source.path)))
        _limit(source)
        return Inspected(checkpoint=_emptied(source, options))
    except (MemoryError, SystemError):  # C code that gets no memory does not always say so
        kind = "CorruptError"
        text = f"{source.path} takes more memory than a file of its size may: it is damaged, or means harm"
    except errors.Error as error:
        kind, text = type(error).__name__, readable(str(error))
    return Inspected(refusal=(kind, text))


def _limit(source: CheckpointSource) -> None:
    """Limit memory and processor time to what the source may add to what is in use."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 1 + _seconds(source))
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # other systems do not keep this limit
        in_use = int(statistics.read_text().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, in_use + _SPARE_BYTES + _TIMES_SIZE * source.size_bytes)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _emptied(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    """Read a checkpoint as the import will, and return it without its values."""
    checkpoint, notes = storable(read(source, options))
    values = (*checkpoint.parts.values(), *checkpoint.extra.values())
    tensor_bytes = sum(_bytes_of_tensors(value, source.path) for value in values)
    if tensor_bytes > _SPARE_BYTES + _TIMES_SIZE * source.size_bytes:
        raise errors.FormatError(
            f"{source.path} has {source.size_bytes} bytes, and its tensors would take {tensor_bytes}: they repeat a "
            "few values, or the file means harm"
        )
    linkable = checkpoint.linkable and (source.path, replace(checkpoint.linkable[1], tensors=()))
    return replace(
        checkpoint,
        parts=dict.fromkeys(checkpoint.parts),
        extra=dict.fromkeys(readable(name) for name in checkpoint.extra),
        generators=dict.fromkeys(checkpoint.generators),
        notes=tuple(readable(note) for note in (*checkpoint.notes, *notes)),
        linkable=linkable,
    )


def _bytes_of_tensors(value: Any, path: Path) -> int:
    encoder = Encoder()
    encoder.encode(value, "state")
    for name, tensor in encoder.tensors.items():
        if not is_possible(tensor.shape):
            raise errors.FormatError(
                f"{path} holds a tensor {name!r} of shape {tuple(tensor.shape)}, which no memory has"
            )
    return sum(tensor.numel() * tensor.element_size() for tensor in encoder.tensors.values())
