"""An SQL index of a repository, and the language that selects from it; it may be deleted at any time.

SQLAlchemy is imported when the index is first used: many commands need only the language.
"""

import importlib
from typing import TYPE_CHECKING, Any

from peakpoint.catalogue.ranking import SelectionQuery

if TYPE_CHECKING:
    from peakpoint.catalogue.access import audit as audit
    from peakpoint.catalogue.access import select as select
    from peakpoint.catalogue.catalogue import Catalogue as Catalogue
    from peakpoint.catalogue.catalogue import Progress as Progress
    from peakpoint.catalogue.run_summary import RunSummary as RunSummary
    from peakpoint.catalogue.selection import Clause as Clause
    from peakpoint.catalogue.selection import Explanation as Explanation
    from peakpoint.catalogue.selection import Selection as Selection

_MODULES = {
    "Catalogue": "catalogue",
    "Clause": "selection",
    "Explanation": "selection",
    "Progress": "catalogue",
    "RunSummary": "run_summary",
    "Selection": "selection",
    "audit": "access",
    "select": "access",
}
__all__ = ["SelectionQuery", *_MODULES]  # noqa: PLE0604 - names, gathered


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'peakpoint.catalogue' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"peakpoint.catalogue.{_MODULES[name]}"), name)
    return value
