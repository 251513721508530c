"""Select from a repository, and audit its index, in one call each."""

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from peakpoint.catalogue.catalogue import Catalogue
from peakpoint.catalogue.database import FILE, VARIABLE
from peakpoint.catalogue.query import parse
from peakpoint.catalogue.ranking import SelectionQuery, WithinSE, ranking_keys
from peakpoint.catalogue.selection import Selection
from peakpoint.errors import ConfigError, MissingExtraError, StoreError
from peakpoint.repository.findings import AuditFinding
from peakpoint.repository.root import Repository
from peakpoint.rules import Mode
from peakpoint.store import Store

_SHOWN = 20  # mismatches, of which there may be millions


def select(
    root: str | os.PathLike[str] | Store | Repository,
    where: str = "",
    *,
    by: Mapping[str, Mode] = MappingProxyType({}),
    top: int | None = None,
    within: WithinSE | None = None,
    catalogue: str | None = None,
) -> Selection:
    """Select checkpoints of all runs that meet a condition, in order; each is read when it is reached.

    They are found through the catalogue, which is brought up to date first: no weight file is opened. A program that
    selects again and again keeps a ``Catalogue``.

    Args:
        root: a directory, a store, or what ``open`` returned.
        where: a condition such as ``'val_accuracy > 0.7 and run ~ "resnet50*"'``; see ``peakpoint.catalogue.query``.
        by: metrics or fields to rank by, with their directions, the most important first: ``{"val_accuracy": "max",
            "size": "min"}``. Without any, the newest come first. What has no finite value of one of them is left out.
        top: how many at most.
        within: what counts as equally good as the best, so that the further keys decide.
        catalogue: where the index is; see ``Catalogue``.

    Raises:
        ConfigError: a condition that cannot be read; the message points at the character.
        NotFoundError: there is no repository, or a metric that no checkpoint has.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Last(9)]) as ckpt:
        ...     for step in (1, 2, 3):
        ...         _ = ckpt.report(step=step, loss=1 / step)
        >>> [checkpoint.step for checkpoint in pp.select(root, "loss < 0.6", by={"loss": "min"})]
        [3, 2]
    """
    request = SelectionQuery(query=parse(where), keys=ranking_keys(by), top=top, within=within)
    return Catalogue(root, catalogue).select(request)


def audit(repository: Repository, catalogue: str | None = None) -> Iterator[AuditFinding]:
    """Compare the catalogue, if there is one, with the files; yields the differences.

    Args:
        catalogue: where the index is; see ``Catalogue``.
    """
    if not (catalogue or os.environ.get(VARIABLE) or repository.store.size(FILE) is not None):
        return
    try:
        index = Catalogue(repository, catalogue)
        mismatches = [mismatch for mismatch in index.compare() if not mismatch.unreadable]
    except (ConfigError, MissingExtraError, StoreError) as error:
        yield AuditFinding("busy", FILE, f"the catalogue was not compared with the files: {error}")
        return
    remedy = "peakpoint audit ROOT --rebuild makes it anew"
    for mismatch in mismatches[:_SHOWN]:
        sentence = f"the catalogue differs from the files: {mismatch.what}; {remedy}"
        yield AuditFinding("damage", index.location, sentence)
    if len(mismatches) > _SHOWN:
        yield AuditFinding("damage", index.location, f"{len(mismatches) - _SHOWN} more of these; {remedy}")
