"""Checks of the weights alone: their bytes, their values, their zeros."""

import math
from collections.abc import Iterator, Mapping

import torch

from peakpoint.format.masks import MASK, ORIGINAL
from peakpoint.format.names import listing
from peakpoint.production.checks.candidate import Candidate, failed, is_floating, passed, skipped
from peakpoint.repository import reader
from peakpoint.repository.validations import Finding
from peakpoint.state.shared_storage import DTYPES

_CHUNK = 1 << 24  # elements looked at at once


def integrity(candidate: Candidate) -> Finding:
    """Every byte of every file against its digest."""
    for file in candidate.manifest.files:
        reader.read(candidate.repository.store, candidate.manifest, file)
    count, size = len(candidate.manifest.files), candidate.manifest.size_bytes
    return passed(f"all {size:,} bytes of {count} files match their digests", files=count, bytes=size)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements, in a type that can be calculated with."""
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        yield chunk.float() if chunk.dtype.itemsize == 1 else chunk


def not_finite_in(tensor: torch.Tensor) -> int:
    """Count the elements of a tensor that are NaN or infinite."""
    return sum(int((~torch.isfinite(chunk)).sum()) for chunk in _chunks(tensor)) if is_floating(tensor) else 0


def finite(candidate: Candidate) -> Finding:
    """No NaN and no infinity in any floating-point tensor of the part."""
    elements = tensors = 0
    not_finite: dict[str, int] = {}
    for name, tensor in candidate.state.each(candidate.wanted.part):
        if not is_floating(tensor):
            continue
        tensors, elements = tensors + 1, elements + tensor.numel()
        if count := not_finite_in(tensor):
            not_finite[name] = count
    if not_finite:
        first, count = next(iter(not_finite.items()))
        more = f"; {len(not_finite)} tensors in all: {listing(list(not_finite))}" if len(not_finite) > 1 else ""
        return failed(f"{first} has {count:,} elements that are NaN or infinite{more}", not_finite=not_finite)
    if not tensors:
        return skipped(f"the part {candidate.wanted.part} has no floating-point tensors")
    return passed(f"{elements:,} elements of {tensors} tensors are finite", elements=elements, tensors=tensors)


# --- sparsity -----------------------------------------------------------------------------------------------------


def sparsity(candidate: Candidate) -> Finding:
    """The recorded sparsity against the zeros in the weights."""
    metric = candidate.wanted.sparsity
    recorded = candidate.recorded.get(metric)
    if recorded is None:
        return skipped(f"no metric {metric} is recorded")
    counts = zeros_of(candidate.state.each(candidate.wanted.part))
    shares = {convention: zeros / elements for convention, (zeros, elements) in counts.items() if elements}
    evidence = {
        "recorded": recorded,
        "tolerance": candidate.wanted.tolerance,
        "counted": {
            convention: {"zeros": zeros, "elements": elements, "sparsity": shares.get(convention)}
            for convention, (zeros, elements) in counts.items()
        },
    }
    recorded_share = recorded / 100 if 1 < recorded <= 100 else recorded  # some record percent
    distances = {convention: abs(share - recorded_share) for convention, share in shares.items()}
    if not distances or not math.isfinite(recorded_share):
        return failed(f"{metric} is recorded as {recorded:g}, and cannot be confirmed: nothing to count", **evidence)
    best = min(distances, key=distances.__getitem__)
    zeros, elements = counts[best]
    text = f"{zeros:,} of {elements:,} {best} are zero: {shares[best]:.6g}"
    if distances[best] <= candidate.wanted.tolerance:
        return passed(f"{metric} {recorded:.6g} is confirmed: {text}", convention=best, **evidence)
    more = ", ".join(f"{share:.6g} of {convention}" for convention, share in shares.items() if convention != best)
    return failed(f"{metric} is recorded as {recorded:.6g}; {text}" + (f" ({more})" if more else ""), **evidence)


def zeros_of(tensors: Iterator[tuple[str, torch.Tensor]]) -> Mapping[str, tuple[int, int]]:
    """Count zeros and elements by each of the conventions in use.

    Negative zero is zero. Where torch.nn.utils.prune is at work, ``weight_orig`` times ``weight_mask`` is the weight,
    and the mask is no weight of its own.

    Args:
        tensors: names and values, one at a time.

    Example:
        >>> pairs = [("a", torch.tensor([[0.0, 1.0]])), ("b", torch.tensor([0.0, 0.0]))]
        >>> zeros_of(iter(pairs))
        {'elements of all floating-point tensors': (3, 4), 'elements of tensors of 2 or more dimensions': (1, 2)}
    """
    plain: dict[str, tuple[int, int, int]] = {}  # zeros, elements, dimensions
    waiting: dict[str, torch.Tensor] = {}
    pruned: dict[str, tuple[int, int, int]] = {}
    for name, tensor in tensors:
        if not is_floating(tensor):
            if not (name.endswith(MASK) and DTYPES.get(tensor.dtype) is not None):
                continue
        else:
            plain[name] = (_zeros(tensor), tensor.numel(), tensor.dim())
        stem = name.removesuffix(ORIGINAL).removesuffix(MASK)
        if stem == name:
            continue
        partner = waiting.pop(stem + (MASK if name.endswith(ORIGINAL) else ORIGINAL), None)
        if partner is None:
            waiting[name] = tensor
        elif partner.shape == tensor.shape:
            masked = sum(_zeros(a * b) for a, b in zip(_chunks(tensor), _chunks(partner), strict=True))
            pruned[stem] = (masked, tensor.numel(), tensor.dim())
    if not pruned:
        return _by_convention(plain, "")
    merged = {stem + end for stem in pruned for end in (ORIGINAL, MASK)}
    effective = {name: row for name, row in plain.items() if name not in merged} | pruned
    return {
        **_by_convention(effective, ", pruned by their masks"),
        "elements that have a mask": _sum(list(pruned.values())),
        **_by_convention(plain, ", masks and originals as they are stored"),
    }


def _by_convention(rows: Mapping[str, tuple[int, int, int]], how: str) -> dict[str, tuple[int, int]]:
    return {
        f"elements of all floating-point tensors{how}": _sum(list(rows.values())),
        f"elements of tensors of 2 or more dimensions{how}": _sum([row for row in rows.values() if row[2] >= 2]),
    }


def _sum(rows: list[tuple[int, int, int]]) -> tuple[int, int]:
    return sum(row[0] for row in rows), sum(row[1] for row in rows)


def _zeros(tensor: torch.Tensor) -> int:
    return sum(chunk.numel() - int(torch.count_nonzero(chunk)) for chunk in _chunks(tensor))
