"""Budgets: what a model may cost in time, memory and size."""

import math
import time
from typing import Any

import torch

from peakpoint.format.masks import masks_of
from peakpoint.format.shards import stored_tensors
from peakpoint.production.checks.candidate import Candidate, failed, passed, skipped
from peakpoint.production.checks.model import one_input
from peakpoint.repository.validations import Finding
from peakpoint.state.shared_storage import TORCH_DTYPES

_WARM_UP = 10  # passes
_FEWEST, _MOST = 20, 200  # passes that are measured
_PATIENCE = 3.0  # seconds, after which the fewest are enough


def no_budgets(candidate: Candidate) -> Finding:  # noqa: ARG001 - all checks are called alike
    """Nothing is limited."""
    return skipped("no budgets were given")


def size_mb(candidate: Candidate) -> Finding:
    """The files of the part."""
    files = candidate.manifest.parts[candidate.wanted.part]
    size = sum(candidate.manifest.file(name).size for name in files)
    return _within(candidate, "size_mb", size / 1e6, f"{size / 1e6:,.6g} MB in {len(files)} files", bytes=size)


def parameters(candidate: Candidate) -> Finding:
    """The numbers that are learnt: of the model or, without one, the elements of the part."""
    if isinstance(candidate.model, torch.nn.Module):
        count, source = sum(parameter.numel() for parameter in candidate.model.parameters()), "of the model"
    else:
        count, source = _elements(candidate), "in the floating-point tensors of the part, buffers among them"
    return _within(candidate, "parameters", count, f"{count:,} parameters {source}", source=source)


def _elements(candidate: Candidate) -> int:
    tensors = stored_tensors(candidate.manifest, candidate.wanted.part)
    masks = masks_of({name: tensor.shape for name, tensor in tensors.items()}).values()
    dtypes = {name for name, dtype in TORCH_DTYPES.items() if dtype.is_floating_point or dtype.is_complex}
    values = [tensor for name, tensor in tensors.items() if tensor.dtype in dtypes and name not in masks]
    return sum(math.prod(tensor.shape) for tensor in values)


def memory_mb(candidate: Candidate) -> Finding:
    """The growth of the process while the model was loaded and run once."""
    reason = _not_runnable(candidate) or candidate.not_run
    peak = candidate.memory
    if reason or peak is None:
        return failed(f"memory cannot be measured: {reason or 'the model was not loaded'}")
    if peak.bytes is None:
        return failed(f"memory cannot be measured: {peak.how}")
    summary = f"{peak.bytes / 1e6:,.4g} MB to load it and to run one input"
    return _within(candidate, "memory_mb", peak.bytes / 1e6, summary, bytes=peak.bytes, how=peak.how)


def latency_ms(candidate: Candidate) -> Finding:
    """The 95th percentile of single forward passes."""
    reason = _not_runnable(candidate)
    if reason:
        return failed(f"latency cannot be measured: {reason}")
    for number in range(_WARM_UP):
        _pass_seconds(candidate, number)
    times: list[float] = []
    while len(times) < _FEWEST or (len(times) < _MOST and sum(times) < _PATIENCE):
        times.append(_pass_seconds(candidate, len(times)))
    times.sort()
    worst = 1e3 * times[math.ceil(0.95 * len(times)) - 1]
    median = 1e3 * times[len(times) // 2]
    threads = torch.get_num_threads()
    summary = f"{worst:.4g} ms at the 95th percentile of {len(times)} passes (median {median:.4g}), {threads} threads"
    return _within(candidate, "latency_ms", worst, summary, median=median, passes=len(times), threads=threads)


BUDGET_CHECKS = {"latency_ms": latency_ms, "memory_mb": memory_mb, "size_mb": size_mb, "parameters": parameters}


def _within(candidate: Candidate, name: str, value: float, summary: str, **evidence: Any) -> Finding:
    limit = candidate.wanted.budgets[name]
    evidence = {"value": value, "budget": limit, **evidence}
    if value <= limit:
        return passed(f"{summary}, within {limit:g}", **evidence)
    return failed(f"{summary}, over the budget of {limit:g}", **evidence)


def _not_runnable(candidate: Candidate) -> str:
    if candidate.model is None:
        return "the model could not be loaded"
    if candidate.golden is None and candidate.example is None:
        return "no inputs: give --golden FILE, or return the model and an example of its inputs"
    return ""


def _pass_seconds(candidate: Candidate, number: int) -> float:
    """Seconds of one forward pass of a single input."""
    inputs = one_input(candidate, number)
    assert inputs is not None
    _wait_for_gpu(inputs[0])
    begin = time.perf_counter()
    with torch.no_grad():
        candidate.model(*inputs)
    _wait_for_gpu(inputs[0])
    return time.perf_counter() - begin


def _wait_for_gpu(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
