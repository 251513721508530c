"""Loading a checkpoint by ref."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.production.policy import read_policies
from peakpoint.repository import reader, signing
from peakpoint.repository.refs import AliasRef, parse_any
from peakpoint.repository.root import Repository
from peakpoint.state.capture import Stateful
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.restore import restore_into
from peakpoint.state.saved import Loaded, check_part_of, read_state, read_trees
from peakpoint.store import Store, open_store


def load(
    ref: str,
    *,
    root: str | os.PathLike[str] | Store,
    into: Any = None,
    part: str = "model",
    strict: bool = True,
    verify: bool = True,
    signed_by: str | os.PathLike[str] | None = None,
) -> Any:
    """Load a checkpoint by ref.

    Without ``into`` this takes milliseconds, whatever the size: each part is read when it is first used. Every byte
    that is used is compared with its digest first. Nothing is unpickled.

    Args:
        ref: such as ``"resnet50@best:val_accuracy"``; see ``peakpoint.repository.refs``.
        into: an object to load ``part`` into (a module, an optimizer, anything with ``load_state_dict``), or a mapping
            of part names to such objects. None returns the state instead.
        part: the part for ``into``, when that is one object.
        strict: raise when anything does not fit; otherwise load what fits and list the rest in the report.
        verify: compare bytes with their digests. Without, tensors are mapped from the files and nothing is read
            before its values are used.
        signed_by: a file with a public key: the checkpoint is refused unless the owner of that key has signed it, which
            is verified before anything else is read. Only together with ``verify``. For an alias whose policy
            (``production.toml``) asks for signatures, the policy's key by default.

    Returns:
        Without ``into`` a mapping of every part, a ``Loaded``: state dicts with tensors on the CPU, and plain values.
        With ``into`` a ``LoadReport``.

    Raises:
        NotFoundError: no such run, checkpoint or part.
        MismatchError: ``strict``, and names, shapes or dtypes differ; nothing was changed.
        CorruptError: the checkpoint is damaged; the message names the file and the tensor.
        SignatureError: ``signed_by``, and the key has not signed the checkpoint, or it has changed since.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> model = torch.nn.Linear(2, 1)
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"model": model}, keep=[pp.Last(1)]) as ckpt:
        ...     _ = ckpt.report(step=1, loss=0.5)
        >>> sorted(pp.load("r@latest", root=root)["model"])
        ['bias', 'weight']
        >>> print(pp.load("r@latest", root=root, into=model).restored[0].what)
        2 of 2 tensors
    """
    store = open_store(root)
    manifest = Repository(store).find_manifest(ref)
    signed_by = key_for(store, ref) if signed_by is None else signed_by
    if signed_by is not None:
        if not verify:
            raise ConfigError("signed_by= needs verify=True: without comparing the bytes, a signature proves nothing")
        signing.verify(store, manifest, public_key=Path(signed_by), files=False)
    hold = reader.hold_for_reading(store, manifest)
    if into is None:
        reader.check_sizes(store, manifest)
        return Loaded(manifest, store, read_trees(store, manifest), verify, _hold=hold)
    if not isinstance(into, Mapping | Stateful):
        raise ConfigError(f"into= takes an object with load_state_dict() or a mapping of parts, not a {kind_of(into)}")
    live = dict(into) if isinstance(into, Mapping) else {part: into}
    for name in live:
        check_part_of(manifest, name)
    saved = read_state(store, manifest, list(live), verify=verify)
    if hold is not None:
        hold.release()
    return restore_into(saved, live, strict=strict, exhaustive=False)


def key_for(store: Store, ref: str) -> Path | None:
    """Return the public key by which the policy of an alias wants signatures; None where it wants none.

    Raises:
        ConfigError: the policy cannot be read.
    """
    parsed = parse_any(ref)
    policy = read_policies(store).of(parsed.alias) if isinstance(parsed, AliasRef) else None
    return None if policy is None else policy.public_key
