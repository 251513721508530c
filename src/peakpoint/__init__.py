"""Peakpoint keeps, finds and ships the best checkpoints of a model's training.

::

    import peakpoint as pp

    with pp.Checkpointer("runs", run="resnet50", state={"model": model, "optimizer": optimizer},
                         keep=[pp.Best("val_accuracy", "max"), pp.Last(3)]) as ckpt:
        for epoch in ckpt.epochs(100):
            train_one_epoch(...)
            ckpt.report(val_accuracy=accuracy)

Public names are imported when they are first used (PEP 562), so that importing the package costs milliseconds and never
imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from peakpoint._version import __version__

if TYPE_CHECKING:
    from peakpoint import rules as rules
    from peakpoint.catalogue import Catalogue as Catalogue
    from peakpoint.catalogue import Selection as Selection
    from peakpoint.catalogue import select as select
    from peakpoint.catalogue.ranking import WithinSE as WithinSE
    from peakpoint.errors import ConfigError as ConfigError
    from peakpoint.errors import ConflictError as ConflictError
    from peakpoint.errors import CorruptError as CorruptError
    from peakpoint.errors import Error as Error
    from peakpoint.errors import FormatError as FormatError
    from peakpoint.errors import MismatchError as MismatchError
    from peakpoint.errors import MissingExtraError as MissingExtraError
    from peakpoint.errors import NotFoundError as NotFoundError
    from peakpoint.errors import PeakpointWarning as PeakpointWarning
    from peakpoint.errors import RefusedError as RefusedError
    from peakpoint.errors import SaveFailedError as SaveFailedError
    from peakpoint.errors import SignatureError as SignatureError
    from peakpoint.errors import StoreError as StoreError
    from peakpoint.errors import TransientStoreError as TransientStoreError
    from peakpoint.exchange.imports import ImportReport as ImportReport
    from peakpoint.exchange.imports import import_checkpoints as import_checkpoints
    from peakpoint.format.manifest import Checkpoint as Checkpoint
    from peakpoint.models.ensemble import Ensemble as Ensemble
    from peakpoint.models.ensemble import ensemble as ensemble
    from peakpoint.models.load import load as load
    from peakpoint.models.soup import Soup as Soup
    from peakpoint.models.soup import soup as soup
    from peakpoint.models.value_diff import diff as diff
    from peakpoint.production import promotion as promotion
    from peakpoint.production.checks.candidate import Candidate as Candidate
    from peakpoint.production.checks.metrics import Evaluated as Evaluated
    from peakpoint.production.checks.validate import validate as validate
    from peakpoint.reports import card as card
    from peakpoint.reports import changelog as changelog
    from peakpoint.reports import evaluation as evaluation
    from peakpoint.reports.diff import Difference as Difference
    from peakpoint.reports.plan.forecast import Forecast as Forecast
    from peakpoint.reports.plan.forecast import forecast as forecast
    from peakpoint.repository import aliases as aliases
    from peakpoint.repository import maintenance as upkeep
    from peakpoint.repository.root import Repository as Repository
    from peakpoint.repository.root import open_repository as open
    from peakpoint.repository.run import Run as Run
    from peakpoint.repository.validations import Validation as Validation
    from peakpoint.rules import Best as Best
    from peakpoint.rules import BestAtSparsity as BestAtSparsity
    from peakpoint.rules import Budget as Budget
    from peakpoint.rules import Every as Every
    from peakpoint.rules import Last as Last
    from peakpoint.rules import Pareto as Pareto
    from peakpoint.rules import Thin as Thin
    from peakpoint.rules import TopK as TopK
    from peakpoint.rules.stopping import EarlyStopping as EarlyStopping
    from peakpoint.state.restore import LoadReport as LoadReport
    from peakpoint.state.saved import Loaded as Loaded
    from peakpoint.training.checkpointer import Checkpointer as Checkpointer
    from peakpoint.training.outcome import Outcome as Outcome
    from peakpoint.training.preemption import Preempt as Preempt

_HOMES = {
    "Best": ("rules", "Best"),
    "BestAtSparsity": ("rules", "BestAtSparsity"),
    "Budget": ("rules", "Budget"),
    "Candidate": ("production.checks.candidate", "Candidate"),
    "Catalogue": ("catalogue", "Catalogue"),
    "Checkpoint": ("format.manifest", "Checkpoint"),
    "Checkpointer": ("training.checkpointer", "Checkpointer"),
    "ConfigError": ("errors", "ConfigError"),
    "ConflictError": ("errors", "ConflictError"),
    "CorruptError": ("errors", "CorruptError"),
    "Difference": ("reports.diff", "Difference"),
    "EarlyStopping": ("rules.stopping", "EarlyStopping"),
    "Ensemble": ("models.ensemble", "Ensemble"),
    "Error": ("errors", "Error"),
    "Evaluated": ("production.checks.metrics", "Evaluated"),
    "Every": ("rules", "Every"),
    "Forecast": ("reports.plan.forecast", "Forecast"),
    "FormatError": ("errors", "FormatError"),
    "ImportReport": ("exchange.imports", "ImportReport"),
    "Last": ("rules", "Last"),
    "LoadReport": ("state.restore", "LoadReport"),
    "Loaded": ("state.saved", "Loaded"),
    "MismatchError": ("errors", "MismatchError"),
    "MissingExtraError": ("errors", "MissingExtraError"),
    "NotFoundError": ("errors", "NotFoundError"),
    "Outcome": ("training.outcome", "Outcome"),
    "PeakpointWarning": ("errors", "PeakpointWarning"),
    "Pareto": ("rules", "Pareto"),
    "Preempt": ("training.preemption", "Preempt"),
    "RefusedError": ("errors", "RefusedError"),
    "Repository": ("repository.root", "Repository"),
    "Run": ("repository.run", "Run"),
    "SaveFailedError": ("errors", "SaveFailedError"),
    "Selection": ("catalogue", "Selection"),
    "SignatureError": ("errors", "SignatureError"),
    "Soup": ("models.soup", "Soup"),
    "StoreError": ("errors", "StoreError"),
    "Thin": ("rules", "Thin"),
    "TopK": ("rules", "TopK"),
    "TransientStoreError": ("errors", "TransientStoreError"),
    "Validation": ("repository.validations", "Validation"),
    "WithinSE": ("catalogue.ranking", "WithinSE"),
    "diff": ("models.value_diff", "diff"),
    "ensemble": ("models.ensemble", "ensemble"),
    "forecast": ("reports.plan.forecast", "forecast"),
    "import_checkpoints": ("exchange.imports", "import_checkpoints"),
    "load": ("models.load", "load"),
    "select": ("catalogue", "select"),
    "open": ("repository.root", "open_repository"),
    "validate": ("production.checks.validate", "validate"),
    "soup": ("models.soup", "soup"),
}
_MODULES = {
    "aliases": "repository.aliases",
    "card": "reports.card",
    "changelog": "reports.changelog",
    "evaluation": "reports.evaluation",
    "promotion": "production.promotion",
    "rules": "rules",
    "upkeep": "repository.maintenance",
}

__all__ = ["__version__", *_HOMES, *_MODULES]  # noqa: PLE0604 - names, gathered


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"peakpoint.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'peakpoint' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    try:
        value = getattr(importlib.import_module(f"peakpoint.{module}"), attribute)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "numpy"):
            raise
        raise ModuleNotFoundError(
            f"peakpoint.{name} needs {error.name}, which is not installed: pip install 'peakpoint[torch]', or install "
            "the build of torch that fits your machine first (https://pytorch.org/get-started)",
            name=error.name,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
