"""The result of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peakpoint.reports.evaluation.compressed import CompressedComparison
from peakpoint.reports.evaluation.groups import Grouping
from peakpoint.reports.evaluation.peaks import RunPeak
from peakpoint.reports.evaluation.run_data import RunData
from peakpoint.reports.evaluation.sparsity import Tradeoff


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What ``evaluate`` returns.

    Attributes:
        location: the repository.
        runs: each run as it was read; ``RunData.rows`` is every value.
        optimizers: run to the class of its optimizer.
        peaks: best and last values, by run and metric.
        groups: runs side by side, by metric.
        tradeoffs: accuracy against sparsity, by metric.
        comparisons: compressed against original.
        remarks: sentences about what is missing or in doubt.
        unread: the runs that could not be read, and why.
    """

    location: str
    runs: tuple[RunData, ...]
    optimizers: Mapping[str, str]
    peaks: tuple[RunPeak, ...]
    groups: tuple[Grouping, ...]
    tradeoffs: tuple[Tradeoff, ...]
    comparisons: tuple[CompressedComparison, ...]
    remarks: tuple[str, ...]
    unread: Mapping[str, str] = field(default_factory=dict)
