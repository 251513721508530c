# The public names: type checkers read them here, and __init__.py imports from here what is asked for.

from peakpoint import distributed as distributed
from peakpoint import errors as errors
from peakpoint import rules as rules
from peakpoint._version import __version__ as __version__
from peakpoint.catalogue import Selection as Selection
from peakpoint.catalogue import select as select
from peakpoint.catalogue.ranking import WithinSE as WithinSE
from peakpoint.errors import ConflictError as ConflictError
from peakpoint.errors import Error as Error
from peakpoint.errors import PeakpointWarning as PeakpointWarning
from peakpoint.errors import SaveFailedError as SaveFailedError
from peakpoint.exchange.imports import import_checkpoints as import_checkpoints
from peakpoint.format.manifest import Checkpoint as Checkpoint
from peakpoint.models.ensemble import ensemble as ensemble
from peakpoint.models.load import load as load
from peakpoint.models.soup import soup as soup
from peakpoint.models.value_diff import diff as diff
from peakpoint.production.checks.candidate import Candidate as Candidate
from peakpoint.production.checks.metrics import Evaluated as Evaluated
from peakpoint.production.checks.validate import validate as validate
from peakpoint.reports.plan.forecast import forecast as forecast
from peakpoint.repository.root import Repository as Repository
from peakpoint.repository.root import open_repository as open  # noqa: F401 - named anew
from peakpoint.repository.run import Run as Run
from peakpoint.rules import Best as Best
from peakpoint.rules import BestAtSparsity as BestAtSparsity
from peakpoint.rules import Budget as Budget
from peakpoint.rules import Every as Every
from peakpoint.rules import Last as Last
from peakpoint.rules import Pareto as Pareto
from peakpoint.rules import Thin as Thin
from peakpoint.rules import TopK as TopK
from peakpoint.rules.stopping import EarlyStopping as EarlyStopping
from peakpoint.training.checkpointer import Checkpointer as Checkpointer
from peakpoint.training.preemption import Preempt as Preempt
