"""The ranges of a file that have digests of their own, and whether its bytes match them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from peakpoint.format.manifest import FileRecord, TensorRecord
from peakpoint.repository.commit import BLOCK
from peakpoint.store import Filling


@dataclass(frozen=True, slots=True)
class HashedRange:
    """A range of a file with a digest of its own.

    Attributes:
        label: the range in words.
        begin: its first byte.
        end: the byte after it.
        digest: of its bytes.
    """

    label: str
    begin: int
    end: int
    digest: str


def grouped(ranges: Iterable[HashedRange]) -> Iterator[list[HashedRange]]:
    """Group ranges so that a thread is worth its start."""
    job: list[HashedRange] = []
    for hashed_range in ranges:
        if job and hashed_range.end - job[0].begin > BLOCK:
            yield job
            job = []
        job.append(hashed_range)
    yield job


def first_mismatch(job: Iterable[HashedRange], filling: Filling) -> HashedRange | None:
    """Return the first range whose bytes have another digest, as they arrive; None when there is none."""
    for hashed_range in job:
        if not 0 <= hashed_range.begin <= hashed_range.end <= len(filling.data):
            return hashed_range
        large = hashed_range.end - hashed_range.begin > BLOCK
        hasher = blake3(max_threads=blake3.AUTO if large else 1)
        for begin in range(hashed_range.begin, hashed_range.end, BLOCK):
            end = min(begin + BLOCK, hashed_range.end)
            filling.wait(end)
            hasher.update(filling.data[begin:end])
        if hasher.hexdigest() != hashed_range.digest:
            return hashed_range
    return None


def hashed_ranges(file: FileRecord) -> Iterator[HashedRange]:
    """Yield the ranges that make up a file."""
    if not file.header:
        yield HashedRange(file.name, 0, file.size, file.digest)
        return
    yield HashedRange(f"the header of {file.name}", 0, file.header, file.header_digest)
    for tensor in file.tensors:
        yield tensor_range(file, tensor)


def tensor_range(file: FileRecord, tensor: TensorRecord) -> HashedRange:
    """Return the range of one tensor."""
    begin, end = file.header + tensor.begin, file.header + tensor.end
    return HashedRange(f"tensor {tensor.name!r} in {file.name}", begin, end, tensor.digest)
