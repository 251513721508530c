"""What a model may cost."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from peakpoint.format.masks import masks_of
from peakpoint.production.checks.candidate import Exam, Said, failed, passed, skipped
from peakpoint.production.checks.model import one_input
from peakpoint.reports.diff import tensors_of
from peakpoint.state.shared_storage import TORCH_DTYPES

_WARM_UP = 10  # passes
_FEWEST, _MOST = 20, 200  # passes that are measured
_PATIENCE = 3.0  # seconds, after which the fewest are enough


def no_budgets(exam: Exam) -> Said:  # noqa: ARG001 - all checks are called alike
    """Nothing is limited."""
    return skipped("no budgets were given")


def budget(name: str) -> Callable[[Exam], Said]:
    """The check of one budget."""
    return {"latency_ms": _latency, "memory_mb": _memory, "size_mb": _size, "parameters": _parameters}[name]


def _said(exam: Exam, name: str, value: float, text: str, **evidence: Any) -> Said:
    limit = exam.wanted.budgets[name]
    evidence = {"value": value, "budget": limit, **evidence}
    if value <= limit:
        return passed(f"{text}, within {limit:g}", **evidence)
    return failed(f"{text}, over the budget of {limit:g}", **evidence)


def _size(exam: Exam) -> Said:
    names = exam.manifest.parts[exam.wanted.part]
    size = sum(exam.manifest.file(name).size for name in names)
    return _said(exam, "size_mb", size / 1e6, f"{size / 1e6:,.6g} MB in {len(names)} files", bytes=size)


def _parameters(exam: Exam) -> Said:
    if isinstance(exam.model, torch.nn.Module):
        count, source = sum(one.numel() for one in exam.model.parameters()), "of the model"
    else:
        source = "in the floating-point tensors of the part, buffers among them"
        rows = {key[1]: one for key, (_, one) in tensors_of(exam.manifest) if key[0] == exam.wanted.part}
        masks = masks_of({name: tuple(one.shape) for name, one in rows.items()}).values()
        dtypes = {name: dtype for name, dtype in TORCH_DTYPES.items() if dtype.is_floating_point or dtype.is_complex}
        count = sum(math.prod(one.shape) for name, one in rows.items() if one.dtype in dtypes and name not in masks)
    return _said(exam, "parameters", count, f"{count:,} parameters {source}", source=source)


def _memory(exam: Exam) -> Said:
    why = _not_runnable(exam) or exam.unrun
    if why or exam.memory is None:
        return failed(f"memory cannot be measured: {why or 'the model was not loaded'}")
    if exam.memory.bytes is None:
        return failed(f"memory cannot be measured: {exam.memory.how}")
    taken = exam.memory.bytes / 1e6
    text = f"{taken:,.4g} MB to load it and to run one input"
    return _said(exam, "memory_mb", taken, text, bytes=exam.memory.bytes, how=exam.memory.how)


def _not_runnable(exam: Exam) -> str:
    if exam.make is None:
        return "no function makes the model: give --model MODULE:FUNCTION"
    if exam.model is None:
        return "the model could not be loaded"
    if exam.golden is None and exam.example is None:
        return "no inputs: give --golden FILE, or return the model and an example of its inputs"
    return ""


def _latency(exam: Exam) -> Said:
    why = _not_runnable(exam)
    if why:
        return failed(f"latency cannot be measured: {why}")
    for number in range(_WARM_UP):
        _pass(exam, number)
    times: list[float] = []
    while len(times) < _FEWEST or (len(times) < _MOST and sum(times) < _PATIENCE):
        times.append(_pass(exam, len(times)))
    times.sort()
    worst = 1e3 * times[math.ceil(0.95 * len(times)) - 1]
    median = 1e3 * times[len(times) // 2]
    threads = torch.get_num_threads()
    text = f"{worst:.4g} ms at the 95th percentile of {len(times)} passes (median {median:.4g}), {threads} threads"
    return _said(exam, "latency_ms", worst, text, median=median, passes=len(times), threads=threads)


def _pass(exam: Exam, number: int) -> float:
    """Seconds of one forward pass of a single input."""
    given = one_input(exam, number)
    assert given is not None
    _settle(given[0])
    begin = time.perf_counter()
    with torch.no_grad():
        exam.model(*given)
    _settle(given[0])
    return time.perf_counter() - begin


def _settle(near: torch.Tensor) -> None:
    """What a GPU has been given is done."""
    if near.is_cuda:
        torch.cuda.synchronize(near.device)
