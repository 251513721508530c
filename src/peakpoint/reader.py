"""Reading checkpoints: manifests are trusted, listings and names are not."""

from collections.abc import Iterator
from dataclasses import dataclass

from peakpoint import layout
from peakpoint.errors import ConfigError, CorruptError, FormatError, NotFoundError
from peakpoint.manifest import MANIFEST, FileRecord, Manifest, decode
from peakpoint.seal import digest
from peakpoint.store import Store
from peakpoint.writer import combined_digest


@dataclass(frozen=True, slots=True)
class Damaged:
    """A directory whose manifest cannot be read.

    Attributes:
        name: the directory.
        error: why.
    """

    name: str
    error: CorruptError | FormatError


@dataclass(frozen=True, slots=True)
class Shelf:
    """What the directory of a run's checkpoints holds.

    Attributes:
        manifests: of every checkpoint that exists, by sequence.
        damaged: directories whose manifest cannot be read.
        bare: directories without a manifest: a save or a removal that is at work, or was cut short.
    """

    manifests: tuple[Manifest, ...]
    damaged: tuple[Damaged, ...]
    bare: tuple[str, ...]


def shelf(store: Store, run: str) -> Shelf:
    """Read every manifest of a run."""
    manifests: list[Manifest] = []
    damaged: list[Damaged] = []
    bare: list[str] = []
    for child in store.children(layout.checkpoints_prefix(run)):
        name = child.removesuffix("/")
        if name == child:
            continue  # a stray file; audit names it
        key = layout.manifest_key(run, name)
        try:
            manifests.append(read_manifest(store, run, name))
        except NotFoundError:
            bare.append(name)
        except (CorruptError, FormatError) as error:
            damaged.append(Damaged(name, type(error)(f"{store.location}/{key}: {error}")))
    manifests.sort(key=lambda manifest: manifest.sequence)
    return Shelf(tuple(manifests), tuple(damaged), tuple(bare))


def read_manifest(store: Store, run: str, name: str) -> Manifest:
    """The manifest in one directory.

    Raises:
        NotFoundError: there is none, so there is no checkpoint.
        CorruptError: it is damaged, or belongs to another directory.
        FormatError: a newer release wrote it.
    """
    manifest = decode(store.get(layout.manifest_key(run, name)), where=MANIFEST)
    if (manifest.run, manifest.name) != (run, name):
        raise CorruptError(
            f"{MANIFEST} says that it belongs to {manifest.run}/{manifest.name}; the directory was renamed or copied"
        )
    return manifest


def view(store: Store, manifest: Manifest, file: FileRecord) -> memoryview:
    """The bytes of one file, of the size that the manifest says.

    Raises:
        CorruptError: the file is missing or has another size.
        FormatError: its name is none that Peakpoint writes.
    """
    key = layout.file_key(manifest.run, manifest.name, file.name)
    try:
        data = store.view(key)
    except NotFoundError as error:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: {file.name} is missing") from error
    except ConfigError as error:
        raise FormatError(f"checkpoint {manifest.name} has a file that cannot be read: {error}") from error
    if len(data) != file.size:
        raise CorruptError(
            f"checkpoint {manifest.name} is damaged: {file.name} has {len(data)} bytes instead of {file.size}"
        )
    return data


def check(manifest: Manifest, file: FileRecord, data: memoryview) -> None:
    """Compare every byte of a file with the digests in the manifest.

    Raises:
        CorruptError: they differ; the message names the file and the tensor.
    """
    for what, begin, end, wanted in _pieces(file):
        if digest(data[begin:end]) != wanted:
            raise CorruptError(
                f"checkpoint {manifest.name} is damaged: {what} does not match its digest "
                f"(bytes {begin} to {end} of {file.name})"
            )
    if file.header and combined_digest(file.header_digest, file.tensors) != file.digest:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: the digests of {file.name} contradict one another")


def _pieces(file: FileRecord) -> Iterator[tuple[str, int, int, str]]:
    if not file.header:
        yield file.name, 0, file.size, file.digest
        return
    yield f"the header of {file.name}", 0, file.header, file.header_digest
    for tensor in file.tensors:
        yield (
            f"tensor {tensor.name!r} in {file.name}",
            file.header + tensor.begin,
            file.header + tensor.end,
            tensor.digest,
        )


def checked_view(store: Store, manifest: Manifest, file: FileRecord) -> memoryview:
    """``view`` and ``check`` in one.

    Raises:
        CorruptError: the file is missing, has another size, or other bytes.
    """
    data = view(store, manifest, file)
    check(manifest, file, data)
    return data
