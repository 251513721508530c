"""A few elements of each tensor, which show whether it has been written to later.

Version counters miss writes through ``.data`` or NumPy. A write that changes a fraction ``f`` of the elements escapes
all ``n`` samples with a probability of about ``(1 - f) ** n``, and ``n`` is at least 64, or one for every 256 KiB. The
step from one to the next has no divisor in common with the number of elements, so that rows and columns of every length
are met, also where whole ones are pruned. The last element is always a sample.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peakpoint.state.shared_storage import is_dense

LEAST_SAMPLES = 64
SMALL = 16 * 1024  # bytes that are copied as quickly as samples are taken
SPACING = 256 * 1024  # bytes from one to the next at most


@functools.lru_cache(4096)
def _step(count: int, width: int, complete_bytes: int) -> int:
    """Return the elements from one sample to the next, for ``count`` elements of ``width`` bytes."""
    step = 1 if count * width <= complete_bytes else max(1, min(count // LEAST_SAMPLES, SPACING // width))
    while math.gcd(step, count) > 1:
        step -= 1
    return step


def can_sample(tensor: torch.Tensor) -> bool:
    """Return whether its elements can be taken by their places in memory."""
    dense = tensor.is_contiguous() or is_dense(tensor.shape, tensor.stride())
    return dense and not tensor.is_conj() and not tensor.is_neg()


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """Samples of tensors of one device and element type, that are taken in one go.

    Attributes:
        numbers: of the tensors.
        places: for each, how many there are, the elements from one to the next, and the first.
        ends: for each, where its samples end among those of the group.
    """

    numbers: list[int]
    places: list[tuple[tuple[int], tuple[int], int]]
    ends: list[int]


class Samples:
    """A choice of elements; good for all tensors of these types, shapes and strides.

    Args:
        tensors: such as ``can_sample`` accepts, none of them empty.
        complete_bytes: of tensors of at most so many bytes, every element is a sample.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], complete_bytes: int = 0) -> None:
        groups: dict[tuple[torch.device, torch.dtype], SampleGroup] = {}
        for number, tensor in enumerate(tensors):
            group = groups.setdefault((tensor.device, tensor.dtype), SampleGroup([], [], []))
            last = tensor.numel() - 1
            step = _step(last + 1, tensor.itemsize, complete_bytes)
            count = last // step + 1
            group.numbers.append(number)
            group.places.append(((count,), (step,), last % step))
            group.ends.append((group.ends[-1] if group.ends else 0) + count)
        self._groups = list(groups.values())

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the samples, as bytes; on CUDA on the current stream, without waiting."""
        return [
            torch.cat(
                [
                    (tensor := tensors[number]).as_strided(size, stride, tensor.storage_offset() + first)
                    for number, (size, stride, first) in zip(group.numbers, group.places, strict=True)
                ]
            ).view(torch.uint8)
            for group in self._groups
        ]

    def take_copies(self, tensors: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the samples of contiguous copies of ``tensors``."""
        pairs = zip(tensors, copies, strict=True)
        return self.take([copy if tensor.is_contiguous() else _in_order(copy, tensor) for tensor, copy in pairs])

    def differing(self, first: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> int | None:
        """Return the number of the first tensor whose samples differ; None when none does."""
        for group, samples, later in zip(self._groups, first, now, strict=True):
            earlier = samples.to(later.device)
            if not torch.equal(earlier, later):
                index = int((earlier != later).nonzero()[0]) * group.ends[-1] // len(earlier)
                return next(number for number, end in zip(group.numbers, group.ends, strict=True) if index < end)
        return None


def _in_order(copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a contiguous copy in the order of the tensor's memory."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return copy.permute(order).contiguous()
