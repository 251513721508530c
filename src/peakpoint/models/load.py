"""Loading a checkpoint that was found: by ref, by path, or as it was returned."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import Checkpoint
from peakpoint.production.policy import key_for
from peakpoint.repository import reader, signing
from peakpoint.repository.root import Repository
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.parts import Stateful
from peakpoint.state.restore import restore_into
from peakpoint.state.saved import Loaded, check_part_of, read_state, read_trees
from peakpoint.store import Store, open_store


def load(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    root: str | os.PathLike[str] | Store | None = None,
    into: Any = None,
    part: str | None = None,
    device: str | torch.device | None = None,
    strict: bool = True,
    verify: bool = True,
    signed_by: str | os.PathLike[str] | None = None,
) -> Any:
    """Load a checkpoint.

    Without ``into`` this takes milliseconds, whatever the size: each part is read when it is first used. Every byte
    that is used is compared with its digest first. Nothing is unpickled.

    Args:
        source: a ``Checkpoint``; with ``root`` a ref such as ``"resnet50@best"``, see ``peakpoint.repository.refs``;
            without, a path: the directory of a checkpoint, or a ref behind the path of its repository, such as
            ``"runs/resnet50@best"``.
        root: the repository: a directory, or a store.
        into: an object to load ``part`` into (a module, an optimizer, anything with ``load_state_dict``), or a mapping
            of part names to such objects. None returns the state instead.
        part: this part alone; with ``into`` one object, ``"model"`` by default.
        device: put the tensors that are returned there.
        strict: raise when anything does not fit; otherwise load what fits and list the rest in the report.
        verify: compare bytes with their digests. Without, tensors are mapped from the files and nothing is read
            before its values are used.
        signed_by: a file with a public key: the checkpoint is refused unless the owner of that key has signed it, which
            is verified before anything else is read. Only together with ``verify``. For an alias whose policy
            (``production.toml``) asks for signatures, the policy's key by default.

    Returns:
        A mapping of every part, a ``Loaded``: state dicts with tensors on the CPU, and plain values; with ``part`` what
        that holds of it. With ``into`` a ``LoadReport``.

    Raises:
        NotFoundError: no such run, checkpoint or part.
        MismatchError: ``strict``, and names, shapes or dtypes differ; nothing was changed.
        CorruptError: the checkpoint is damaged; the message names the file and the tensor.
        ConfigError: a path that leads to no repository, or ``device`` is none of this machine.
        SignatureError: ``signed_by``, and the key has not signed the checkpoint, or it has changed since.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> model = torch.nn.Linear(2, 1)
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"model": model}, keep=[pp.Last(1)]) as ckpt:
        ...     _ = ckpt.report(step=1, loss=0.5)
        >>> sorted(pp.load(f"{root}/r@latest", part="model"))
        ['bias', 'weight']
        >>> print(pp.load("r@latest", root=root, into=model).restored[0].what)
        2 of 2 tensors
    """
    _check_together(into, part, device)
    store, ref = _located(source, root)
    manifest = Repository(store).find_manifest(ref)
    signed_by = key_for(store, ref) if signed_by is None else signed_by
    if signed_by is not None:
        if not verify:
            raise ConfigError("signed_by= needs verify=True: without comparing the bytes, a signature proves nothing")
        signing.verify(store, manifest, public_key=Path(signed_by), files=False)
    hold = reader.hold_for_reading(store, manifest)
    if into is None:
        reader.check_sizes(store, manifest)
        loaded = Loaded(manifest, store, read_trees(store, manifest), verify, _hold=hold, _device=device)
        if part is None:
            return loaded
        try:
            return loaded[check_part_of(manifest, part)]
        finally:
            loaded.close()
    live = dict(into) if isinstance(into, Mapping) else {"model" if part is None else part: into}
    for name in live:
        check_part_of(manifest, name)
    saved = read_state(store, manifest, list(live), verify=verify)
    if hold is not None:
        hold.release()
    return restore_into(saved, live, strict=strict, exhaustive=False)


def _check_together(target: Any, part: str | None, device: str | torch.device | None) -> None:
    """Refuse what cannot be loaded into, a device that is not here, and what has no meaning together."""
    if not isinstance(target, Mapping | Stateful | None):
        raise ConfigError(
            f"into= takes an object with load_state_dict() or a mapping of parts, not a {kind_of(target)}"
        )
    if part is not None and isinstance(target, Mapping):
        raise ConfigError(f"into= names the parts that it wants, so part={part!r} has no meaning with it")
    if device is None:
        return
    if target is not None:
        raise ConfigError("into= fills an object where it is, so device= has no meaning with it; move the object")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} cannot be used here: {error}") from error


# below a repository: the directory of a checkpoint, and that of a run with what is wanted of it
_DIRECTORY = re.compile(rf"^{layout.RUNS}/([^/]+)/checkpoints/([^/]+)/*$")
_NO_CHECKPOINT = re.compile(rf"^{layout.RUNS}/[^/@:]+(/.*)?$")  # a run, or something below it
_OF_RUN = re.compile(rf"^{layout.RUNS}/([^/@:]+[@:].*)$")


def _located(
    source: str | os.PathLike[str] | Checkpoint, root: str | os.PathLike[str] | Store | None
) -> tuple[Store, str]:
    """Return the store and the ref of what is to be loaded."""
    if isinstance(source, Checkpoint):
        if root is None:
            if source.path is None:
                raise ConfigError(f"{source.ref} is in a store without directories; give root=")
            root = source.path.parents[3]
        return open_store(root), f"{source.run}/{source.id}"
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"load() takes a Checkpoint, a ref or a path, not a {kind_of(source)}")
    text = os.fspath(source)
    if root is not None:
        return open_store(root), text
    path = text if text.startswith("/") else f"{Path.cwd()}/{text}"  # no Path: a metric may have slashes
    slashes = [position for position, character in enumerate(path) if character == "/"]
    for slash in reversed(slashes):
        directory, remainder = path[:slash] or "/", path[slash + 1 :]
        if os.path.isfile(f"{directory}/{layout.REPOSITORY}"):  # noqa: PTH113 - false for what is no path at all
            is_ref = os.path.isdir(f"{directory}/{layout.RUNS}/{layout.RUNS}")  # noqa: PTH112 - of a run of that name
            if _NO_CHECKPOINT.match(remainder) and not _DIRECTORY.match(remainder) and not is_ref:
                raise ConfigError(
                    f"{text!r} is no checkpoint: give the directory of one, {directory}/{layout.RUNS}/RUN/checkpoints/"
                    f"NAME, or a ref such as '{directory}/RUN@best'"
                )
            return open_store(directory), _OF_RUN.sub(r"\1", _DIRECTORY.sub(r"\1/\2", remainder))
    raise NotFoundError(
        f"{text!r} leads into no repository: give a ref with root=, such as root='runs', or a path such as "
        "'runs/resnet50@best'"
    )
