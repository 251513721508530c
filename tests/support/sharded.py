"""Checkpoints as several processes would write them, each its own shards, made by one."""

import itertools
import json
from dataclasses import replace

import torch

import peakpoint as pp
from peakpoint.format import layout
from peakpoint.format.shards import stored_tensors
from peakpoint.repository import reader
from peakpoint.repository.commit import commit, image_of, put_files
from peakpoint.state.saved import read_tensors
from peakpoint.state.shared_storage import DTYPES
from peakpoint.state.tensor_files import StagingBuffer
from peakpoint.store import MemoryStore
from strategies import manifest


def mesh(*ways):
    """Cut a tensor among the ranks of a mesh of these sizes, a dimension by each, in chunks as torch does."""

    def cut(tensor):
        pieces = [[(0, size)] for size in tensor.shape]
        for dim, count in zip(range(tensor.dim()), ways, strict=False):
            chunk = -(-tensor.shape[dim] // count)
            begins = range(0, tensor.shape[dim], max(chunk, 1))
            pieces[dim] = [(begin, min(chunk, tensor.shape[dim] - begin)) for begin in begins] or [(0, 0)]
        return [tuple(zip(*box, strict=True)) or ((), ()) for box in itertools.product(*pieces)]

    return cut


def box_of(tensor, offsets, sizes):
    """The elements of a box."""
    return tensor[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))]


def rank_images(part, tensors, cut):
    """The files of each rank, made apart from the others."""
    ranks = {}
    for name, tensor in tensors.items():
        for rank, (offsets, sizes) in enumerate(cut(tensor)):
            ranks.setdefault(rank, {})[name] = box_of(tensor, offsets, sizes).contiguous(), offsets
    for rank, shards in ranks.items():
        file = layout.rank_file(f"{part}.safetensors", rank)
        content = {name: tensor for name, (tensor, _) in shards.items()}
        yield StagingBuffer().capture(
            {file: content}, shards={file: {name: offsets for name, (_, offsets) in shards.items()}}
        )[0][0]


def sharded_tree(tree, tensors):
    """The tree of a part, whose tensors are said to be in shards."""
    if isinstance(tree, list):
        return [sharded_tree(child, tensors) for child in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.get("$") != "tensor":
        return {key: sharded_tree(child, tensors) for key, child in tree.items()}
    tensor = tensors[tree["name"]]
    return tree | {"$": "sharded", "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}


def shard(root, ref, cut, previous=None):
    """Write a checkpoint anew in shards, as the same checkpoint; returns its manifest."""
    store = pp.open(root).store
    old = pp.open(root).find_manifest(ref)
    state = json.loads(bytes(reader.read(store, old, old.file(layout.STATE))))
    content = {part: read_tensors(store, old, part) for part, files in old.parts.items() if files}
    content = {part: {name: tensor.clone() for name, tensor in tensors.items()} for part, tensors in content.items()}
    store.delete(layout.manifest_key(old.run, old.name))
    for file in old.files:
        store.delete(layout.file_key(old.run, old.name, file.name))
    written = {}
    for part, tensors in content.items():
        state["parts"][part] = sharded_tree(state["parts"][part], tensors)
        for image in rank_images(part, tensors, cut):
            written.setdefault(part, []).extend(put_files(store, old, [replace(image, stable=True)], previous))
    draft = replace(old, files=(), parts=dict.fromkeys(old.parts, ()))
    image = image_of(layout.STATE, json.dumps(state).encode())
    return commit(store, draft, [image], written=lambda: written, first=lambda: None)


def stored(tensor, boxes):
    """A store in memory with one tensor in these boxes, its manifest, and the tensor as it is stored."""
    store, draft = MemoryStore(), manifest(files=(), parts={})
    records = put_files(store, draft, list(rank_images("model", {"w": tensor}, lambda _: boxes)))
    made = commit(store, draft, [], written=lambda: {"model": records}, first=lambda: None)
    return store, made, stored_tensors(made, "model")["w"]


def random_tensor(shape, dtype, seed=0):
    """Random bytes of an element type."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.Size(shape).numel())
    octets = torch.randint(0, 2 if dtype == torch.bool else 256, (count, dtype.itemsize), generator=generator)
    return octets.to(torch.uint8).reshape(-1).view(dtype).reshape(shape)
