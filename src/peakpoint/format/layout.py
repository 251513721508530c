"""Keys: where everything is in a repository.

::

    peakpoint.json                                       the repository, created once
    production.toml                                      what may be released, written by people
    catalogue.sqlite                                     an index, which may be deleted at any time
    aliases/<alias>/<number>.json                        what an alias points at: the highest number counts
    aliases/<alias>/<number>.told.json                   that all hooks have been told of it
    releases/<id>.json                                   a release that an earlier version made or refused
    runs/<run>/run.json                                  the run, created once
    runs/<run>/writer.lock                               held by the process that writes the run
    runs/<run>/renamed.json                              the former names of the run
    runs/<run>/removed.json                              that the run is being removed as a whole
    runs/<run>/archived.json                             that the run is archived
    runs/<run>/archive/<id>.pack                         the bytes of a checkpoint of an archived run
    runs/<run>/journal/<number>.jsonl                    what was reported and done
    runs/<run>/validations/<id>/<number>.json            what was found when a checkpoint was validated
    runs/<run>/validations/<id>/<digest>.predictions     what was predicted then
    runs/<run>/checkpoints/<name>/manifest.json          the checkpoint: without it there is none
    runs/<run>/checkpoints/<name>/state.json             the state but for its tensors
    runs/<run>/checkpoints/<name>/<part>.safetensors     the tensors of a part
    runs/<run>/checkpoints/<name>/<part>+rank<n>.safetensors   those that one process of several has written
    runs/<run>/checkpoints/<name>/signature-<number>.json
    runs/<run>/checkpoints/<name>/dropped-<number>.json  parts that are gone
    runs/<run>/checkpoints/<name>/trashed.json           that it is in the trash, with its manifest
    runs/<run>/checkpoints/<name>/archived.json          that it alone is archived, which earlier code wrote
"""

import re

from peakpoint.format.manifest import MANIFEST

REPOSITORY = "peakpoint.json"
RUNS = "runs"
ALIASES = "aliases"
RELEASES = "releases"
POLICY = "production.toml"
STATE = "state.json"
DROPPED = "dropped-"  # and a number: the records of parts that are gone
ARCHIVED = "archived.json"  # of a run: its files are in packs; earlier code wrote such records of single checkpoints
TRASHED = "trashed.json"  # the record of a checkpoint that can be brought back
SIGNATURE = "signature-"  # and a number: the signatures of a checkpoint
PACK = ".pack"

_SIGNATURE = re.compile(rf"{SIGNATURE}([0-9]{{1,9}})\.json")


def is_record(child: str) -> bool:
    """Whether a name in a checkpoint's directory is that of a record beside the manifest."""
    return is_dropped(child) or child in {ARCHIVED, TRASHED} or is_signature(child)


def is_dropped(child: str) -> bool:
    """Whether a name in a checkpoint's directory is that of a record of dropped parts."""
    return child.startswith(DROPPED) and not child.endswith("/")


def number(child: str, prefix: str, suffix: str) -> int:
    """Return the number between a prefix and a suffix of a name, also of a directory; 0 for every other name.

    Example:
        >>> number("000007.jsonl/", "", ".jsonl"), number("dropped-2.json", DROPPED, ".json"), number("x", "", "")
        (7, 2, 0)
    """
    name = child.removesuffix("/")
    digits = name.removeprefix(prefix).removesuffix(suffix)
    return int(digits) if name == prefix + digits + suffix and digits.isascii() and digits.isdecimal() else 0


def is_signature(child: str) -> bool:
    """Whether a name in a checkpoint's directory is that of a signature."""
    return _SIGNATURE.fullmatch(child) is not None


def signature_number(child: str) -> int:
    """The number of a signature; 0 for every other name."""
    match = _SIGNATURE.fullmatch(child)
    return int(match[1]) if match else 0


def run_prefix(run: str) -> str:
    """The directory of a run."""
    return f"{RUNS}/{run}"


def run_record(run: str) -> str:
    """The record that makes a run exist."""
    return f"{RUNS}/{run}/run.json"


def renamed_key(run: str) -> str:
    """The record of the former names of a run."""
    return f"{RUNS}/{run}/renamed.json"


def removed_key(run: str) -> str:
    """The record that a run is being removed as a whole."""
    return f"{RUNS}/{run}/removed.json"


def writer_lock(run: str) -> str:
    """What the writer of a run holds."""
    return f"{RUNS}/{run}/writer.lock"


def journal_prefix(run: str) -> str:
    """The directory of a run's journal."""
    return f"{RUNS}/{run}/journal"


def checkpoints_prefix(run: str) -> str:
    """The directory of a run's checkpoints."""
    return f"{RUNS}/{run}/checkpoints"


def checkpoint_prefix(run: str, name: str) -> str:
    """The directory of one checkpoint."""
    return f"{RUNS}/{run}/checkpoints/{name}"


def manifest_key(run: str, name: str) -> str:
    """The manifest of one checkpoint."""
    return f"{RUNS}/{run}/checkpoints/{name}/{MANIFEST}"


def file_key(run: str, name: str, file: str) -> str:
    """One file of one checkpoint."""
    return f"{RUNS}/{run}/checkpoints/{name}/{file}"


def rank_file(file: str, rank: int) -> str:
    """The name of a tensor file of one process of several.

    Example:
        >>> rank_file("model.safetensors", 3), rank_file("model+frozen.safetensors", 0)
        ('model+rank3.safetensors', 'model+frozen+rank0.safetensors')
    """
    stem = file.removesuffix(".safetensors")
    return f"{stem}+rank{rank}.safetensors"


def rank_of(file: str) -> int | None:
    """Return which process of several has written a tensor file; None for one that has no such mark.

    Example:
        >>> rank_of("model+frozen+rank12.safetensors"), rank_of("model.safetensors")
        (12, None)
    """
    mark = file.removesuffix(".safetensors").rpartition("+")[2]
    return int(mark.removeprefix("rank")) if re.fullmatch(r"rank\d+", mark) else None


def archived_key(run: str) -> str:
    """The record that a run is archived."""
    return f"{RUNS}/{run}/{ARCHIVED}"


def singly_archived_key(run: str, name: str) -> str:
    """The record that one checkpoint is archived, which earlier code wrote."""
    return f"{RUNS}/{run}/checkpoints/{name}/{ARCHIVED}"


def trashed_key(run: str, name: str) -> str:
    """The record that a checkpoint is in the trash."""
    return f"{RUNS}/{run}/checkpoints/{name}/{TRASHED}"


def archive_prefix(run: str) -> str:
    """The directory of a run's packs."""
    return f"{RUNS}/{run}/archive"


def pack_key(run: str, checkpoint: str) -> str:
    """The pack of one checkpoint, by its id."""
    return f"{RUNS}/{run}/archive/{checkpoint}{PACK}"


def validations_of(run: str) -> str:
    """The directory with the validations of all checkpoints of a run."""
    return f"{RUNS}/{run}/validations"


def validations_prefix(run: str, checkpoint: str) -> str:
    """The directory of a checkpoint's validations, by its id; it outlives the checkpoint."""
    return f"{validations_of(run)}/{checkpoint}"


def validation_key(run: str, checkpoint: str, number: int) -> str:
    """The record of one validation."""
    return f"{validations_prefix(run, checkpoint)}/{number:06d}.json"


def predictions_key(run: str, checkpoint: str, digest: str) -> str:
    """Predictions that a validation has kept, by the digest of the file."""
    return f"{validations_prefix(run, checkpoint)}/{digest[:16]}.predictions"


def alias_prefix(alias: str) -> str:
    """The directory of an alias's records."""
    return f"{ALIASES}/{alias}"


def alias_key(alias: str, number: int) -> str:
    """One record of an alias."""
    return f"{ALIASES}/{alias}/{number:06d}.json"


def told_key(alias: str, number: int) -> str:
    """The note that all hooks have been told of a change of an alias."""
    return f"{ALIASES}/{alias}/{number:06d}.told.json"


def release_key(release: str) -> str:
    """The record of a release, by its id."""
    return f"{RELEASES}/{release}.json"
