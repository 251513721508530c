"""The language of selection: ``val_accuracy > 0.70 and epoch > 20 and run ~ "resnet50*"``.

A subset of Python's expressions with some words of SQL. A text becomes a tree of frozen values (``query.tree``), or an
error that points at the character; nothing is ever evaluated. ``catalogue.sql`` makes SQL with parameters of the tree.

A comparison with a value that is missing (a metric that was not reported, or is NaN; an epoch outside epochs) is
neither true nor false: it never matches, also not under ``not``.
"""

from peakpoint.catalogue.query.parser import parse, parse_key
from peakpoint.catalogue.query.tree import FIELDS, Condition, Field, Metric, Query, point

__all__ = ["FIELDS", "Condition", "Field", "Metric", "Query", "parse", "parse_key", "point"]
