"""A repository: a root with runs, opened for reading."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, TypeVar

from peakpoint.errors import ConfigError, ConflictError, CorruptError, Error, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.manifest import Checkpoint, Manifest
from peakpoint.format.names import did_you_mean, listing
from peakpoint.format.sealed import FORMAT, decode_record, seal
from peakpoint.format.settings import Settings
from peakpoint.repository import aliases, reader, refs, remains
from peakpoint.repository.run import Run
from peakpoint.repository.run_names import present_name
from peakpoint.rules import Rule
from peakpoint.store import SMALL, LocalStore, Store, establish, open_store

T = TypeVar("T")


class Repository:
    """A root with runs; what ``peakpoint.open`` returns. Reading only, safe beside a writing trainer.

    Raises:
        NotFoundError: the store has no repository.
        FormatError: a newer release wrote it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        try:
            data = store.get(layout.REPOSITORY, max_size=SMALL)
        except NotFoundError as error:
            raise NotFoundError(
                f"{store.location} is not a Peakpoint repository: it has no {layout.REPOSITORY}{_nearby(store)}"
            ) from error
        decode_record(dict, data, where=f"{store.location}/{layout.REPOSITORY}")  # refuses other formats

    def __repr__(self) -> str:
        return f"Repository({self.store.location!r})"

    def _names(self) -> list[str]:
        children = self.store.children(layout.RUNS)
        return [child.rstrip("/") for child in children if child.endswith("/") and self._is_run(child.rstrip("/"))]

    def _is_run(self, name: str) -> bool:
        try:
            return self.store.size(layout.run_record(name)) is not None
        except StoreError:
            return True  # of another user, who may not let it be read: reading it says so

    def runs(self) -> list[Run]:
        """Return every run, by name."""
        return [Run(self.store, name) for name in self._names()]

    def read_runs(self, read: Callable[[Run], T]) -> tuple[dict[str, T], dict[str, str]]:
        """Read something of every run; a run that cannot be read keeps nobody from the others.

        Returns:
            What was read, by run; and why the other runs cannot be read, by run.
        """
        values: dict[str, T] = {}
        errors: dict[str, str] = {}
        for run in self.runs():
            try:
                values[run.name] = read(run)
            except NotFoundError:
                continue  # removed meanwhile
            except Error as error:  # whatever its records say, such as rules of a newer release
                errors[run.name] = str(error)
        return values, errors

    def run(self, name: str) -> Run:
        """Return one run.

        Raises:
            NotFoundError: there is no run of that name; the message names near ones, or the one that had it.
        """
        names = self._names()
        if name not in names:
            new_name = present_name(self.store, name, names)
            if new_name is not None:
                raise NotFoundError(
                    f"{self.store.location} has no run {name!r} any more: it is called {new_name!r} now"
                )
            hint = did_you_mean(name, names) or f"; runs: {listing(names, 10) or 'none'}"
            raise NotFoundError(f"{self.store.location} has no run {name!r}{hint}")
        return Run(self.store, name)

    def find(self, ref: str) -> Checkpoint:
        """Return the checkpoint that ``ref`` names, such as ``"resnet50@best:val_accuracy"`` or ``"@champion"``.

        Raises:
            NotFoundError: no such run, checkpoint or alias.
            ConfigError: ``ref`` has none of the forms of refs.
            CorruptError: the checkpoint that an alias points at is not the one that was promoted.
        """
        run, manifest = self.locate(ref)
        return run.find(f"{manifest.run}/{manifest.id}")

    def find_manifest(self, ref: str) -> Manifest:
        """Return the manifest of the checkpoint that ``ref`` names; errors as in ``find``."""
        return self.locate(ref)[1]

    def locate(self, ref: str) -> tuple[Run, Manifest]:
        """Return the run and the manifest of the checkpoint that ``ref`` names; errors as in ``find``."""
        if refs.is_run(ref):
            self.run(ref)  # which says that there is none
        parsed = refs.parse_any(ref)
        if isinstance(parsed, refs.AliasRef):
            return self._aliased(parsed)
        run = self.run(parsed.run)
        return run, run.find_manifest(ref)

    def _aliased(self, ref: refs.AliasRef) -> tuple[Run, Manifest]:
        if ref.number is None:
            record = aliases.holder(self.store, ref.alias)
        else:
            record = aliases.read(self.store, ref.alias, ref.number)
        target = record.target
        if target is None:
            raise NotFoundError(f"record {record.number} of {ref.alias} retired it: it pointed at nothing then")
        try:
            manifest = reader.read_manifest(self.store, target.run, target.name)
        except NotFoundError as error:
            raise NotFoundError(_missing_target(record)) from error
        if manifest.id != target.checkpoint:
            raise NotFoundError(f"{_missing_target(record)}; {manifest.id} has its directory now")
        if reader.manifest_digest(self.store, manifest) != target.manifest:
            raise CorruptError(
                f"{target.run}/{target.name} has another manifest than when it became {ref.alias} (record "
                f"{record.number}): it was tampered with; peakpoint rollback ROOT {ref.alias} goes back one"
            )
        return self.run(target.run), manifest


def _missing_target(record: aliases.AliasRecord) -> str:
    target = record.target
    assert target is not None
    return (
        f"record {record.number} of {record.alias} points at {target.run}/{target.name} ({target.checkpoint}), which "
        "does not exist any more; peakpoint undo ROOT --list shows whether it can be restored, peakpoint rollback ROOT "
        f"{record.alias} goes back one"
    )


def _nearby(store: Store) -> str:
    """Return a hint when the root of a repository is right above or below this one."""
    for child in store.children("")[:200]:
        if child.endswith("/") and store.size(f"{child}{layout.REPOSITORY}") is not None:
            return f"; did you mean {store.location}/{child.rstrip('/')}?"
    if isinstance(store, LocalStore):
        for parent in store.root.absolute().parents:
            if (parent / layout.REPOSITORY).is_file():
                return f"; did you mean {parent}?"
    return ""


def open_repository(root: str | os.PathLike[str] | Store) -> Repository:
    """Open the repository at ``root`` for reading.

    Args:
        root: a directory, or a store.

    Raises:
        NotFoundError: ``root`` has no repository.
        ConfigError: ``root`` is of a kind that this release does not support.
        FormatError: a newer release wrote it.
    """
    return Repository(open_store(root))


def ensure_repository(store: Store, now: datetime) -> Repository:
    """Open the repository, creating it first when there is none.

    Raises:
        StoreError: it cannot be created.
    """
    if store.size(layout.REPOSITORY) is None:
        _create_once(store, layout.REPOSITORY, {"format": FORMAT, "kind": "peakpoint repository", "created_at": now})
    return Repository(store)


def ensure_run(
    store: Store,
    run: str,
    now: datetime,
    by: Mapping[str, str],
    rules: Sequence[Rule],
    settings: Settings = Settings(),  # noqa: B008 - a frozen value
) -> None:
    """Write the run's record unless it exists; with the settings that it begins with, if there are any.

    Raises:
        StoreError: it cannot be written.
    """
    if store.size(layout.run_record(run)) is None:
        if remains.are_remains(store, run):  # of an earlier run of that name
            remains.delete_remains(store, run)
        record = {
            "format": FORMAT,
            "run": run,
            "created_at": now,
            "by": dict(by),
            "rules": [rule.text for rule in rules],
            **{name: value for name, value in asdict(settings).items() if value},
        }
        _create_once(store, layout.run_record(run), record)


def check_capitals(store: Store, run: str, parts: Iterable[str] = ()) -> None:
    """Refuse names that differ from others in capital letters only, where the store takes them for the same.

    Args:
        store: of an existing repository.
        run: to be written.
        parts: of its state.

    Raises:
        ConfigError: says which.
    """
    if store.size(layout.REPOSITORY.upper()) is None:
        return
    names = [child.rstrip("/") for child in store.children(layout.RUNS) if child.rstrip("/") != run] + [run]
    for kind, group in (("runs", names), ("parts", list(parts))):
        first: dict[str, str] = {}
        for name in group:
            if (same := first.setdefault(name.casefold(), name)) != name:
                raise ConfigError(
                    f"{store.location} does not tell capital letters apart, so the {kind} {same!r} and {name!r} would "
                    "overwrite each other; rename one of them"
                )


def check_not_renamed(store: Store, run: str) -> None:
    """Refuse to continue a run under a former name of it, which would begin another from nothing.

    Raises:
        ConfigError: says what it is called now.
    """
    if store.size(layout.run_record(run)) is not None:
        return
    new_name = present_name(store, run, [child.rstrip("/") for child in store.children(layout.RUNS)])
    if new_name is not None:
        raise ConfigError(
            f"run {run!r} in {store.location} is called {new_name!r} now: write run={new_name!r} to continue it, or "
            'resume="never" to begin another run of the former name'
        )


def _create_once(store: Store, key: str, record: dict[str, Any]) -> None:
    try:
        establish(store, key, seal(record))
    except ConflictError:
        # another process has just created the same record
        if store.size(key) is None:
            raise
