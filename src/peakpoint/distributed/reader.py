"""Loads of ``torch.distributed.checkpoint``: any number of ranks, each its own boxes of whatever was written."""

import io
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from peakpoint.errors import ConfigError, ConflictError, MismatchError
from peakpoint.format.names import EXTRA, listing
from peakpoint.format.shards import StoredTensor, stored_tensors
from peakpoint.production.policy import key_for
from peakpoint.repository import reader, signing
from peakpoint.repository.root import Repository
from peakpoint.state.saved import read_trees, tensor_nodes
from peakpoint.state.shards import dtype_of, read_box, read_tensor
from peakpoint.state.typed_json import Decoder
from peakpoint.store import Store, open_store


class Reader(StorageReader):
    """Loads with ``torch.distributed.checkpoint.load`` from a checkpoint, on any number of ranks and any mesh.

    It may be any checkpoint of a repository, also one of a ``Checkpointer``: its parts are the first level of the state
    dict. Each rank reads the shards that have something of its own, and verifies them as a whole. Tensors must have the
    element types that were saved.

    Errors arrive in a ``CheckpointException`` of torch; names that the checkpoint lacks, and other shapes, are refused
    by torch's planner, before anything is read.

    Args:
        root: the repository, a directory that all ranks see, or a store.
        ref: which checkpoint, such as ``"resnet50@latest"``. An alias whose policy (``production.toml``) asks for
            signatures leads to what is signed only.

    Raises:
        NotFoundError: there is no such repository, run or checkpoint.
        CorruptError: files of the checkpoint are missing, or what describes it is damaged.
        FormatError: a newer release wrote it.
        SignatureError: the policy of the alias asks for a signature that the checkpoint does not have.
    """

    def __init__(self, root: str | os.PathLike[str] | Store, ref: str) -> None:
        self._store = open_store(root)
        self._manifest = Repository(self._store).find_manifest(ref)
        public_key = key_for(self._store, ref)
        if public_key is not None:
            signing.verify(self._store, self._manifest, public_key=public_key, files=False)  # what is read is compared
        self._hold = reader.hold_for_reading(self._store, self._manifest)  # until this is not used any more
        reader.check_sizes(self._store, self._manifest)
        trees = read_trees(self._store, self._manifest)
        self._tensors: dict[str, tuple[dict[str, Any], StoredTensor]] = {}  # by the names of the state dict
        outline: dict[str, Any] = {}
        for part, tree in trees.parts.items():
            is_first_level = part == EXTRA and EXTRA in trees.optional
            outline |= self._outline(part, tree, "" if is_first_level else part)
        planner = _flat(outline)
        _, self._metadata = planner.create_global_plan([planner.create_local_plan()])
        self._values: Mapping[str, Any] = planner.state_dict

    def _outline(self, part: str, tree: Any, prefix: str) -> dict[str, Any]:
        """Return the content of a part in a state dict, where tensors that are loaded one by one have no values."""
        stored = stored_tensors(self._manifest, part)
        nodes = {".".join(filter(None, (prefix, path))): node for path, node in tensor_nodes(tree)}
        hollow = {node["name"] for node in nodes.values()}  # not the bytes of arrays
        content = self._decoded(tree, stored, hollow)
        names = _flat({prefix: content} if prefix else content).state_dict
        inside = {node["name"] for name, node in nodes.items() if name not in names}  # of tuples and the like
        if inside:
            content = self._decoded(tree, stored, hollow - inside)
        self._tensors |= {name: (node, stored[node["name"]]) for name, node in nodes.items()}
        return {prefix: content} if prefix else dict(content)

    def _decoded(self, tree: Any, stored: Mapping[str, StoredTensor], hollow: AbstractSet[str]) -> Any:
        tensors = {
            name: torch.empty(tensor.shape, dtype=dtype_of(tensor), device="meta")
            if name in hollow
            else read_tensor(self._store, self._manifest, tensor)
            for name, tensor in stored.items()
        }
        return Decoder(tensors).decode(tree)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Return False: a path is no ref."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew.

        Raises:
            ConfigError: ``checkpoint_id=`` was given.
        """
        if checkpoint_id is not None:
            raise ConfigError(
                f"checkpoint_id={str(checkpoint_id)!r} has no meaning with this reader, which has a ref: leave it out"
            )

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what the checkpoint has: every tensor as if it were whole."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:  # noqa: FBT001
        """Begin a load."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan with the checkpoint that this rank reads."""
        return replace(plan, storage_data=self._manifest.id)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans.

        Raises:
            ConflictError: the ranks read different checkpoints, as when one is saved while they look for the newest.
        """
        for rank, plan in enumerate(plans):
            if plan.storage_data != plans[0].storage_data:
                raise ConflictError(
                    f"rank {rank} reads checkpoint {plan.storage_data} and rank 0 {plans[0].storage_data}: give a ref "
                    f"that always means the same, such as '{self._manifest.run}/{self._manifest.name}'"
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, and compare it with its digests.

        Raises:
            MismatchError: tensors of the state dict have other element types; nothing was read.
            CorruptError: a file is damaged; the message names it and the tensor. What was loaded does not count.
        """
        targets = [(item, planner.resolve_tensor(item)) for item in plan.items if item.type == LoadItemType.TENSOR]
        self._check_dtypes(targets)
        for item, target in targets:
            self._read(item, target.detach())
            planner.commit_tensor(item, target)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                value = io.BytesIO()
                torch.save(self._values[item.storage_index.fqn], value)  # in memory: planners take it in this form
                value.seek(0)
                planner.load_bytes(item, value)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _check_dtypes(self, targets: Sequence[tuple[ReadItem, torch.Tensor]]) -> None:
        differences = []
        for item, target in targets:
            name, saved = item.dest_index.fqn, self._values[item.storage_index.fqn].dtype
            if saved != target.dtype:
                differences.append(f"{name}: {saved} in the checkpoint, {target.dtype} in the state dict")
        if differences:
            raise MismatchError(
                f"{self._manifest.name} does not fit the state dict: {listing(differences)}. Load into tensors of the "
                "saved element types, and convert these",
                tuple(differences),
            )

    def _read(self, item: ReadItem, target: torch.Tensor) -> None:
        node, stored = self._tensors[item.storage_index.fqn]
        offsets, sizes = item.storage_offsets, item.lengths
        if "view" not in node:
            read_box(self._store, self._manifest, stored, offsets, sizes, target=target)
            return
        base = read_tensor(self._store, self._manifest, stored)
        tensor: torch.Tensor = Decoder({stored.name: base}).decode(node)
        box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
        target.copy_(tensor.detach()[box])


def _flat(state: dict[str, Any]) -> DefaultSavePlanner:
    """Return a planner that knows a state dict by the names that ``torch.distributed.checkpoint`` gives its values."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    return planner
