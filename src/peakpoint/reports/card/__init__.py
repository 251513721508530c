"""The model card of a checkpoint: Markdown with the front matter that the Hugging Face Hub reads.

::

    import peakpoint as pp
    from peakpoint.reports import card

    champion = card.gather(pp.open("runs"), "@champion", card.ModelDescription(license="apache-2.0", data="CIFAR-10"))
    card.write(champion, "champion-card")

It shows what the records and the ``ModelDescription`` hold; everything else is "not recorded".
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peakpoint.errors import ConfigError, ConflictError, NotFoundError, needing
from peakpoint.format.events import Event, Saved
from peakpoint.format.manifest import Manifest
from peakpoint.reports.card.values import MARK, AliasPeriod, ModelCard, ModelDescription
from peakpoint.reports.diff import openings
from peakpoint.reports.evaluation.files import replace_file
from peakpoint.reports.evaluation.run_data import RunData, read_run_data
from peakpoint.repository import aliases, reader, signing, validations
from peakpoint.repository.annotations import measurements_of
from peakpoint.repository.root import Repository
from peakpoint.rules import ranking_metrics
from peakpoint.store import Store, translated

__all__ = ["AliasPeriod", "ModelCard", "ModelDescription", "gather", "markdown", "write"]

CURVE = "curve.png"
PAGE = "README.md"


def gather(repository: Repository, ref: str, description: ModelDescription | None = None) -> ModelCard:
    """Read all that is recorded of a checkpoint, without its weights.

    Args:
        ref: the checkpoint, such as ``"@champion"``.
        description: what no record holds.

    Raises:
        NotFoundError: no such checkpoint or alias.
        CorruptError: an alias points at a checkpoint that is not the promoted one.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Best("acc", "max")]) as ckpt:
        ...     _ = ckpt.report(step=1, acc=0.7)
        >>> print(markdown(gather(pp.open(root), "r@latest", ModelDescription(license="mit"))).splitlines()[2])
        license: mit
    """
    run, manifest = repository.locate(ref)
    run_data = read_run_data(run)
    events = run.events()
    readable_validations, validation_damage = validations.readable(run.store, run.name, manifest.id)
    alias_periods, alias_damage = _alias_periods(run.store, manifest)
    metrics = {checkpoint.id: checkpoint.metrics for checkpoint in run_data.checkpoints}
    return ModelCard(
        location=repository.store.location,
        manifest=manifest,
        manifest_digest=reader.manifest_digest(run.store, manifest),
        run_data=run_data,
        claims=run.kept().get(manifest.id, ()),
        metrics=metrics.get(manifest.id, manifest.metrics),
        measured=measurements_of(events, manifest.id),
        state=next((opened.state for opened in reversed(openings(events, manifest)) if opened.state), {}),
        lineage=_lineage(run_data, events, manifest),
        validations=tuple(readable_validations),
        signatures=signing.signatures(run.store, run.name, manifest.name),
        alias_periods=tuple(alias_periods),
        damage=(*validation_damage.values(), *alias_damage),
        description=description or ModelDescription(),
    )


def _lineage(run_data: RunData, events: Sequence[Event], manifest: Manifest) -> tuple[tuple[str, bool], ...]:
    """The ancestors, the nearest first, and whether each exists: it ends at one that is gone."""
    names = {event.checkpoint: event.name for event in events if isinstance(event, Saved)}
    parents = {checkpoint.id: checkpoint.parent for checkpoint in run_data.checkpoints}
    lineage: list[tuple[str, bool]] = []
    ancestor = manifest.parent
    while ancestor is not None and len(lineage) <= len(parents):  # a bound, should damaged records form a circle
        lineage.append((f"{manifest.run}/{names.get(ancestor, ancestor)}", ancestor in parents))
        ancestor = parents.get(ancestor)
    return tuple(lineage)


def _alias_periods(store: Store, manifest: Manifest) -> tuple[list[AliasPeriod], list[str]]:
    """When aliases pointed at a checkpoint, and the damage of their histories."""
    periods: list[AliasPeriod] = []
    damage: list[str] = []
    for alias in aliases.names(store):
        history = aliases.history(store, alias)
        newest = aliases.numbers(store, alias)[-1]
        damage += history.damage
        neighbours = zip((None, *history.records), history.records, (*history.records[1:], None), strict=False)
        for previous, record, following in neighbours:
            if record.target is not None and record.target.checkpoint == manifest.id:
                periods.append(AliasPeriod(record, previous, following, record.number == newest))
    return periods, damage


def markdown(card: ModelCard, picture: str | None = None) -> str:
    """Render a card.

    Args:
        card: the result of ``gather``.
        picture: the path of the curve, relative to the page; without it a table of reports takes its place.

    Raises:
        MissingExtraError: ``pip install 'peakpoint[card]'``.
    """
    with needing("card", "model cards need"):
        page: Any = importlib.import_module("peakpoint.reports.card.page")
    return str(page.markdown(card, picture))


def write(card: ModelCard, folder: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
    """Write a card to a folder: ``README.md``, and ``curve.png`` where Matplotlib is installed.

    Args:
        folder: created when it does not exist.
        force: also replace a ``README.md`` that is not an earlier card, and a ``curve.png`` beside it.

    Returns:
        The files.

    Raises:
        ConflictError: such a file exists.
        MissingExtraError: ``pip install 'peakpoint[card]'``.
        StoreError: a file cannot be written.
    """
    page, picture = Path(folder) / PAGE, Path(folder) / CURVE
    _check_free(page, picture, force=force)
    curve = _curve(card)
    text = markdown(card, None if curve is None else CURVE)
    if curve is not None:
        replace_file(picture, curve)
    replace_file(page, text.encode())
    return [page] if curve is None else [page, picture]


def _check_free(page: Path, picture: Path, *, force: bool) -> None:
    with translated("look at", page):
        is_card = page.exists() and MARK in page.read_text(encoding="utf-8", errors="ignore")
        existing = [file for file in (page, picture) if file.exists()]
    if existing and not is_card and not force:
        raise ConflictError(
            f"{existing[0]} exists and is not an earlier card: choose another folder, or replace it with --force"
        )


def _curve(card: ModelCard) -> bytes | None:
    """Draw the first metric that rules rank by, with its peak and this checkpoint; None when it cannot be drawn."""
    ranked_by = ranking_metrics(card.run_data.rules)
    if not ranked_by:
        return None
    try:
        figures: Any = importlib.import_module("peakpoint.reports.evaluation.figures")
    except ModuleNotFoundError:
        return None  # the page has a table instead, and says what draws
    metric, mode = ranked_by[0]
    value = card.metrics.get(metric)
    point = None if value is None else (card.manifest.step, card.manifest.epoch, value)
    panel = figures.curve(card.run_data, metric, mode, point)
    return None if panel is None else bytes(figures.save([panel], ".png"))


def about_text(path: Path) -> str:
    """Read the user's text for a card.

    Raises:
        NotFoundError: no such file.
        ConfigError: a file that is not text in UTF-8.
        StoreError: it cannot be read.
    """
    if not path.exists():
        raise NotFoundError(f"file {path} does not exist")
    try:
        with translated("read", path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: {error}") from error
