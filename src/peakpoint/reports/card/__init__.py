"""The model card: what one checkpoint is, in Markdown with the front matter that the Hugging Face Hub reads.

::

    import peakpoint as pp
    from peakpoint.reports import card

    found = card.gather(pp.open("runs"), "@champion", card.ModelDescription(license="apache-2.0", data="CIFAR-10"))
    card.write(found, "champion-card")

Everything in it is read from the records, or was told by whoever writes it; what neither says is "not recorded".
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peakpoint.errors import ConfigError, ConflictError, NotFoundError
from peakpoint.format.events import Event, Measured, Opened, Saved
from peakpoint.format.manifest import Manifest
from peakpoint.reports.card.template import MARK, markdown
from peakpoint.reports.card.values import AliasPeriod, ModelCard, ModelDescription
from peakpoint.reports.evaluation.files import replace_file
from peakpoint.reports.evaluation.run_data import RunData, read_run_data
from peakpoint.repository import aliases, reader, signing, validations
from peakpoint.repository.aliases import AliasRecord
from peakpoint.repository.root import Repository
from peakpoint.rules import watched
from peakpoint.store import Store, translated

__all__ = ["AliasPeriod", "ModelCard", "ModelDescription", "gather", "markdown", "write"]

CURVE = "curve.png"
PAGE = "README.md"


def gather(repository: Repository, ref: str, description: ModelDescription | None = None) -> ModelCard:
    """Read all that is recorded of a checkpoint; no weights.

    Args:
        repository: where it is.
        ref: which, above all ``"@champion"``.
        description: what no record says.

    Raises:
        NotFoundError: no such checkpoint or alias.
        CorruptError: what an alias points at is not what was promoted.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Best("acc", "max")]) as ckpt:
        ...     _ = ckpt.report(step=1, acc=0.7)
        >>> print(markdown(gather(pp.open(root), "r@latest", ModelDescription(license="mit"))).splitlines()[2])
        license: "mit"
    """
    run, manifest = repository.locate(ref)
    material = read_run_data(run)
    events = run.events()
    found, damage = validations.readable(run.store, run.name, manifest.id)
    held, broken = _held(run.store, manifest)
    return ModelCard(
        ref=ref,
        location=repository.store.location,
        manifest=manifest,
        manifest_digest=reader.manifest_digest(run.store, manifest),
        run_data=material,
        claims=run.kept().get(manifest.id, ()),
        metrics=next((one.metrics for one in material.checkpoints if one.id == manifest.id), manifest.metrics),
        measured=tuple(event for event in events if isinstance(event, Measured) and event.checkpoint == manifest.id),
        state=_classes(events, manifest),
        lineage=_lineage(material, events, manifest),
        validations=tuple(found),
        signatures=signing.signatures(run.store, run.name, manifest.name),
        alias_periods=held,
        damage=(*damage, *broken),
        description=description or ModelDescription(),
    )


def _classes(events: tuple[Event, ...], manifest: Manifest) -> Mapping[str, str]:
    """The classes of the state, as the process has given them that saved the checkpoint."""
    state: Mapping[str, str] = {}
    for event in events:
        if isinstance(event, Opened) and event.state:
            state = event.state
        elif isinstance(event, Saved) and event.checkpoint == manifest.id:
            break
    return state


def _lineage(material: RunData, events: tuple[Event, ...], manifest: Manifest) -> tuple[tuple[str, bool], ...]:
    """What it continues, the nearest first, and whether that exists; what is gone does not say what it continued."""
    names = {event.checkpoint: event.name for event in events if isinstance(event, Saved)}
    parents = {one.id: one.parent for one in material.checkpoints}
    found: list[tuple[str, bool]] = []
    at = manifest.parent
    while at is not None and len(found) < len(parents) + 1:
        found.append((f"{manifest.run}/{names.get(at, at)}", at in parents))
        at = parents.get(at)
    return tuple(found)


def _held(store: Store, manifest: Manifest) -> tuple[tuple[AliasPeriod, ...], tuple[str, ...]]:
    """When aliases pointed at a checkpoint, and what of their histories cannot be read."""
    held: list[AliasPeriod] = []
    damage: list[str] = []
    for alias in aliases.names(store):
        found = aliases.history(store, alias)
        newest = aliases.numbers(store, alias)[-1]
        damage += found.damage
        held += [
            AliasPeriod(record, before, after, record.number == newest)
            for before, record, after in zip(
                (None, *found.records), found.records, (*found.records[1:], None), strict=False
            )
            if _is(record, manifest)
        ]
    return tuple(held), tuple(damage)


def _is(record: AliasRecord, manifest: Manifest) -> bool:
    return record.target is not None and record.target.checkpoint == manifest.id


def write(found: ModelCard, folder: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
    """Write a card to a folder: ``README.md``, and ``curve.png`` where Matplotlib is installed.

    Args:
        found: what ``gather`` returned.
        folder: made when it does not exist.
        force: also replace a ``README.md`` that is no card of ours, and a ``curve.png`` beside it.

    Returns:
        The files.

    Raises:
        ConflictError: there is one.
        StoreError: the disk said no.
    """
    target = Path(folder)
    page, picture = target / PAGE, target / CURVE
    _check(page, picture, force=force)
    drawn = _curve(found)
    if drawn is not None:
        replace_file(picture, drawn)
    replace_file(page, markdown(found, None if drawn is None else CURVE).encode())
    return [page] if drawn is None else [page, picture]


def _check(page: Path, picture: Path, *, force: bool) -> None:
    with translated("look at", page):
        ours = page.exists() and MARK in page.read_text(encoding="utf-8", errors="ignore")
        there = [one for one in (page, picture) if one.exists()]
    if there and not ours and not force:
        raise ConflictError(
            f"{there[0]} exists and is no card of ours; choose another folder, or replace it with --force"
        )


def _curve(found: ModelCard) -> bytes | None:
    """The first metric that rules rank by, with its peak and this checkpoint; None when it cannot be drawn."""
    pairs = watched(found.run_data.rules)
    if not pairs:
        return None
    try:
        figures: Any = importlib.import_module("peakpoint.reports.evaluation.figures")
    except ModuleNotFoundError:
        return None  # the page has a table instead, and says what draws
    metric, mode = pairs[0]
    manifest = found.manifest
    value = found.metrics.get(metric)
    here = None if value is None else (manifest.step, manifest.epoch, value)
    panel = figures.curve(found.run_data, metric, mode, here)
    return None if panel is None else bytes(figures.save([panel], ".png"))


def about_text(path: Path) -> str:
    """The text of a user's file.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it is no text.
        StoreError: it cannot be read.
    """
    if not path.exists():
        raise NotFoundError(f"there is no file {path}")
    try:
        with translated("read", path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}") from error
