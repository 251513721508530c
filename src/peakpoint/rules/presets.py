"""Rules that many runs want together.

``parts="model"`` lets what is kept to look at, or to use, have no more than its weights; what a run continues from
always has everything.
"""

from collections.abc import Iterable

from peakpoint.rules.metric import Best, BestAtSparsity, Pareto
from peakpoint.rules.record import Mode
from peakpoint.rules.schedule import Every, Last
from peakpoint.rules.text import Rule

Parts = tuple[str, ...] | str | None


def research(metric: str, mode: Mode, *, parts: Parts = None) -> list[Rule]:
    """The best, every tenth epoch, the last three: to look back at, and to continue from.

    Example:
        >>> from peakpoint import rules
        >>> [rule.text for rule in rules.research("val_accuracy", "max")]
        ['best:val_accuracy:max', 'every:10ep', 'last:3']
        >>> [rule.text for rule in rules.research("val_accuracy", "max", parts="model")]
        ['best:val_accuracy:max:parts=model', 'every:10ep:parts=model', 'last:3']
    """
    return [Best(metric, mode, parts=parts), Every(epochs=10, parts=parts), Last(3)]


def production(metric: str, mode: Mode, *, parts: Parts = None) -> list[Rule]:
    """The best, what is not evaluated yet (three at most), one an hour for a day, the last.

    Example:
        >>> from peakpoint import rules
        >>> [rule.text for rule in rules.production("val_loss", "min")]
        ['best:val_loss:min:pending=3', 'every:60min:24', 'last:1']
    """
    return [Best(metric, mode, pending=3, parts=parts), Every(minutes=60, keep=24, parts=parts), Last(1)]


def pruning(
    metric: str,
    mode: Mode,
    targets: Iterable[float] = (0.5, 0.7, 0.9),
    *,
    sparsity: str = "sparsity",
    parts: Parts = None,
) -> list[Rule]:
    """The best at each sparsity, the trade-off between the two, the last.

    Example:
        >>> from peakpoint import rules
        >>> [rule.text for rule in rules.pruning("acc", "max", (0.5, 0.9))]
        ['best-at:acc:max:sparsity:0.5,0.9:0.01', 'pareto:acc:max:sparsity:max', 'last:1']
    """
    return [
        BestAtSparsity(metric, mode, tuple(targets), sparsity=sparsity, parts=parts),
        Pareto({metric: mode, sparsity: "max"}, parts=parts),
        Last(1),
    ]
