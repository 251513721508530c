"""The copy from host memory to GPUs, through two small pinned blocks: one is filled while the other is being sent.

Copies from memory that is not pinned are slower, and stop the processor for as long as they last; pinning a whole
mapped checkpoint would take longer than the copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

BLOCK = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class UploadPiece:
    """A range of bytes that is sent in one go.

    Attributes:
        target: on the GPU.
        source: in host memory; as many bytes.
        begin: where the bytes are in the block.
    """

    target: torch.Tensor
    source: torch.Tensor
    begin: int


def plan(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], block: int = BLOCK) -> Iterator[list[UploadPiece]]:
    """Cut pairs of contiguous byte tensors into loads of at most ``block`` bytes each."""
    load: list[UploadPiece] = []
    filled = 0
    for target, source in pairs:
        begin = 0
        while begin < len(source):
            size = min(len(source) - begin, block - filled)
            load.append(UploadPiece(target[begin : begin + size], source[begin : begin + size], filled))
            begin, filled = begin + size, filled + size
            if filled == block:
                yield load
                load, filled = [], 0
    if load:
        yield load


def send(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> set[int]:
    """Copy tensors from host memory into tensors on GPUs, where both are contiguous; the others are left alone.

    Returns:
        The ``id`` of every source that has been copied.
    """
    sent: set[int] = set()
    by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for target, source in pairs:
        if _can_send(target, source):
            flat = target.detach().view(-1).view(torch.uint8), source.detach().view(-1).view(torch.uint8)
            by_device.setdefault(target.device, []).append(flat)
            sent.add(id(source))
    for device, flats in by_device.items():
        _send_to(device, flats)
    return sent


def _can_send(target: object, source: object) -> bool:
    return (
        isinstance(target, torch.Tensor)
        and isinstance(source, torch.Tensor)
        and target.is_cuda
        and source.is_cpu
        and source.numel() > 0
        and (target.dtype, target.shape) == (source.dtype, source.shape)
        and target.is_contiguous()
        and source.is_contiguous()
        and not (target.is_conj() or target.is_neg() or source.is_conj() or source.is_neg())
    )


@torch.no_grad()
def _send_to(device: torch.device, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    blocks = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    free = [torch.cuda.Event() for _ in blocks]  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)
    for number, load in enumerate(plan(pairs)):
        block, event = blocks[number % 2], free[number % 2]
        event.synchronize()  # nothing to wait for the first time
        for piece in load:
            staged = block[piece.begin : piece.begin + len(piece.source)]
            staged.copy_(piece.source)
            piece.target.copy_(staged, non_blocking=True)
        event.record(stream)
    stream.synchronize()
