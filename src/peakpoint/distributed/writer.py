"""Saves of ``torch.distributed.checkpoint``: each rank writes its own shards, the first commits."""

import contextlib
import itertools
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from peakpoint.distributed.run_save import RunSave, SaveMoment
from peakpoint.errors import ConfigError
from peakpoint.format import layout
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.format.metrics import read_metrics
from peakpoint.format.names import EXTRA, check_part, check_run, check_text
from peakpoint.repository.commit import BLOCK, put_files
from peakpoint.state.json_scalars import TAG, StatePath, encode_scalar, is_unicode, make_path
from peakpoint.state.shared_storage import DTYPES
from peakpoint.state.streamed_copy import RingBuffer
from peakpoint.state.typed_json import Encoder, check_tensor
from peakpoint.store import Store, open_store
from peakpoint.store.threads import Worker

_RING = 4 * BLOCK

Keys = tuple[str | int, ...]
"""The keys that lead to a value of a state dict: text of dicts, numbers of lists."""


@dataclass(frozen=True, slots=True)
class _WriteTask:
    """What the first rank tells each of them.

    Attributes:
        draft: the checkpoint to be.
        rank: the number of this one.
        size: how many there are.
    """

    draft: Manifest
    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class _SavedValue:
    """A value as it stands in ``state.json``."""

    keys: Keys
    tree: Any


class Writer(StorageWriter):
    """Saves with ``torch.distributed.checkpoint.save``, or ``async_save``, into a run.

    Make one on every rank with the same arguments, for one save. Each rank writes its own shards, hashed and durable;
    the first one, which holds the run meanwhile, commits last: a rank that dies leaves a whole checkpoint or none. The
    checkpoint is kept until it is removed by hand, as one of ``Checkpointer.save``.

    The dicts of the state dict become the parts: save ``{"model": ..., "optim": ...}``. What is no dict, at the first
    level, goes into the part ``extra``. Values that are not tensors are kept as typed JSON, never pickled, and what
    cannot be kept exactly is refused. As always with ``torch.distributed.checkpoint``, keys become text, empty dicts
    are left out, and errors arrive in a ``CheckpointException``.

    Args:
        root: the repository, a directory that all ranks see, or a store.
        run: the run's name; it may have checkpoints, also of a ``Checkpointer``, but no process may be writing it.
        step: optimizer steps completed.
        epoch: the epoch that is over, from 0; None outside epochs.
        metrics: of this moment, by name.
        reason: why it is saved; stands in the manifest.

    Raises:
        ConfigError: an argument cannot work.

    Example:
        >>> import tempfile, warnings, torch, peakpoint as pp, torch.distributed.checkpoint as dcp
        >>> from peakpoint.distributed import Reader, Writer
        >>> model, root = torch.nn.Linear(2, 1), tempfile.mkdtemp()
        >>> warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process
        >>> _ = dcp.save({"model": model}, storage_writer=Writer(root, run="r", step=5, metrics={"loss": 0.5}))
        >>> pp.load("r@latest", root=root)["model"]["weight"].equal(model.weight)
        True
        >>> dcp.load({"model": model}, storage_reader=Reader(root, "r@best:loss:min"))
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Store,
        *,
        run: str,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        reason: str = "torch.distributed.checkpoint.save",
    ) -> None:
        for name, value in (("step", step), ("epoch", 0 if epoch is None else epoch)):
            if type(value) is not int or value < 0:
                raise ConfigError(f"{name}= takes a whole number from 0 on, not {value!r}")
        if not check_text("reason=", reason).strip():
            raise ConfigError("reason= is empty: it says later why this checkpoint was saved")
        self._store = open_store(root)
        self._moment = SaveMoment(
            run=check_run(run), step=step, epoch=epoch, metrics=read_metrics(metrics or {}), reason=reason
        )
        self._save: RunSave | None = None  # of the first rank
        self._order: list[Keys] = []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Return False: no path says what run a checkpoint is of."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew.

        Raises:
            ConfigError: ``checkpoint_id=`` was given.
        """
        if checkpoint_id is not None:
            raise ConfigError(
                f"checkpoint_id={str(checkpoint_id)!r} has no meaning with this writer, which names checkpoints "
                "itself: leave it out"
            )

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:  # noqa: ARG002, FBT001
        """Begin a save.

        Raises:
            ConfigError: ``use_collectives=False``.
        """
        if not kwargs.get("use_collectives", True):
            raise ConfigError("use_collectives=False makes a checkpoint of each rank: leave it out")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan."""
        return _check_usable(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Hold the run, and tell each rank what to write."""
        self._save = RunSave(self._store, self._moment)
        draft, size = self._save.draft, len(plans)
        return [
            replace(_check_usable(plan), storage_data=_WriteTask(draft, rank, size)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the files of this rank, durably.

        Raises:
            ConfigError: a value cannot be kept exactly, or a part cannot have its name; the message says where it is.
            StoreError: the store refused.
        """
        future: Future[list[WriteResult]] = Future()
        try:
            future.set_result(self._write(plan, planner))
        except BaseException:
            self._release()
            raise
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        task: _WriteTask = plan.storage_data
        files = _RankFiles(task.rank if task.size > 1 else None)
        places: Mapping[str, Keys] = getattr(planner, "mappings", {})
        self._order = list(places.values())
        results = []
        for item in plan.items:
            keys = places.get(item.index.fqn, (item.index.fqn,))
            value = files.add(item, keys, planner)
            if value is not None:
                results.append(WriteResult(item.index, 0, value))
        with contextlib.closing(RingBuffer(_RING)) as ring, Worker("peakpoint-copy") as copier:
            images, copying = ring.capture(files.tensors, files.shards)
            copier.do(copying.run)
            try:
                records = put_files(self._store, task.draft, images)
            finally:
                copying.abandon()
        return results + [WriteResult(MetadataIndex(files.parts[file.name]), file.size, file) for file in records]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        """Make the checkpoint exist, on the first rank, when all have written.

        Raises:
            ConfigError: the state dict has nothing in it, or a dict ``extra`` beside what is none.
            ConflictError: the run was not held all the time, or the ranks write into different directories.
            StoreError: the store refused.
        """
        assert self._save is not None
        try:
            trees: dict[Keys, Any] = {}
            written = defaultdict[str, list[FileRecord]](list)
            for result in itertools.chain.from_iterable(results):
                if isinstance(result.storage_data, FileRecord):
                    written[result.index.fqn].append(result.storage_data)
                else:
                    trees[result.storage_data.keys] = result.storage_data.tree
            ordered = {keys: trees[keys] for keys in self._order if keys in trees} | trees
            parts = {_part(keys) for keys in ordered}
            optional = [EXTRA] if any(len(keys) == 1 for keys in ordered) else []
            if not parts:
                raise ConfigError('the state dict is empty: save at least {"model": model.state_dict()}')
            if optional and any(len(keys) > 1 and keys[0] == EXTRA for keys in ordered):
                raise ConfigError(f"the state dict has a dict {EXTRA!r}, and values beside dicts: rename that dict")
            tree = _nested({(_part(keys), *_inner(keys)): value for keys, value in ordered.items()})
            self._save.commit(tree, written, optional)
        finally:
            self._release()

    def _release(self) -> None:
        """Let go of the run, if this rank holds it."""
        if self._save is not None:
            self._save.release()
            self._save = None


class _RankFiles:
    """What one rank writes, by file.

    Args:
        rank: None for the only one.

    Attributes:
        tensors: file name to its tensors by name.
        shards: file name to the offsets of those that are shards.
        parts: file name to its part.
    """

    def __init__(self, rank: int | None) -> None:
        self._rank = rank
        self.tensors: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        self.shards: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        self.parts: dict[str, str] = {}

    def add(self, item: WriteItem, keys: Keys, planner: SavePlanner) -> _SavedValue | None:
        """Take an item of the plan; returns None for a shard without elements.

        Raises:
            ConfigError: it cannot be kept exactly, or its part cannot have its name.
        """
        path = _path(keys)
        file = f"{check_part(_part(keys))}.safetensors"
        file = file if self._rank is None else layout.rank_file(file, self._rank)
        self.parts[file] = _part(keys)
        if item.type == WriteItemType.BYTE_IO:
            if not hasattr(planner, "lookup_object"):
                raise ConfigError(f"planner= is a {type(planner).__name__}: give one made from DefaultSavePlanner")
            encoder = Encoder()
            tree = encoder.encode(planner.lookup_object(item.index), path)
            if encoder.shards:
                raise ConfigError(f"{path} has tensors inside that are divided among ranks: make it a dict or a list")
            for name, inner in encoder.tensors.items():
                self._add_tensor(file, name, inner)
            return _SavedValue(keys, tree)
        assert item.tensor_data is not None
        chunk, shape = item.tensor_data.chunk, item.tensor_data.size
        if not chunk.sizes.numel() and shape.numel():
            return None
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        check_tensor(tensor, path)
        name = ".".join(map(str, _inner(keys)))
        self._add_tensor(file, name, tensor.detach())
        if chunk.sizes == shape:
            return _SavedValue(keys, {TAG: "tensor", "name": name})
        self.shards[file][name] = tuple(chunk.offsets)
        node = {TAG: "sharded", "name": name, "dtype": DTYPES[tensor.dtype], "shape": list(shape)}
        return _SavedValue(keys, node)

    def _add_tensor(self, file: str, name: str, tensor: torch.Tensor) -> None:
        if name in self.tensors[file] or name == "__metadata__":
            raise ConfigError(
                f"{file} cannot have the tensor {name!r}: rename it, or, if this rank has several shards of it, save "
                "it as a DTensor, which has one"
            )
        self.tensors[file][name] = tensor


def _check_usable(plan: SavePlan) -> SavePlan:
    if not getattr(plan, "usable", True):  # of torch 2.7 on
        raise ConfigError("enable_plan_caching=True of the planner sends no plan to this writer: leave it out")
    return plan


def _part(keys: Keys) -> str:
    """Return the part that a value goes into."""
    return str(keys[0]) if len(keys) > 1 else EXTRA


def _inner(keys: Keys) -> Keys:
    """Return the keys that lead to a value in its part."""
    return keys[1:] if len(keys) > 1 else keys


def _path(keys: Keys) -> StatePath:
    path: StatePath | str = f'state["{keys[0]}"]' if len(keys) > 1 else "state"
    for key in _inner(keys):
        path = make_path((path, key, False))
    assert isinstance(path, StatePath)
    return path


def _nested(trees: Mapping[Keys, Any]) -> Any:
    """Put trees together that each stand at the end of some keys.

    Example:
        >>> _nested({("model", "w"): 1, ("optim", "groups", 0, "lr"): 2})
        {'model': {'w': 1}, 'optim': {'groups': [{'lr': 2}]}}
    """
    if () in trees:
        return trees[()]
    levels: dict[str | int, dict[Keys, Any]] = {}
    for (key, *remaining), tree in trees.items():
        levels.setdefault(key, {})[tuple(remaining)] = tree
    children = {key: _nested(level) for key, level in levels.items()}
    if all(isinstance(key, int) for key in children):
        return [children.get(number) for number in range(1 + max(map(int, children)))]
    if all(not str(key).startswith(TAG) and is_unicode(str(key)) for key in children):
        return children
    return {TAG: "dict", "v": [[encode_scalar(key, ""), child] for key, child in children.items()]}
