"""The order of the batches of a pass over data: what it depends on, and the way back to a place in it.

It depends on the random generators of the process, on those that belong to the loader (its own, its sampler's, its
dataset's), and on settings such as the batch size. A loader is started again with the generators as they were when the
pass began, and the batches that were used are drawn and dropped. The first of them shows whether the data, and what is
done to it, are still the same.
"""

import gc
import hashlib
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from peakpoint.errors import ConfigError, MismatchError
from peakpoint.state import rng
from peakpoint.state.parts import Stateful, is_generator
from peakpoint.state.samples import SMALL, Samples, can_sample
from peakpoint.training.outcome import warn
from peakpoint.training.position import Batches, DataPass

_MOST_OBJECTS, _MOST_ELEMENTS = 1000, 32  # a dataset may hold millions of samples
_OPAQUE = (
    type,
    str,
    bytes,
    torch.Tensor,
    torch.nn.Module,
    np.ndarray,
    BuiltinFunctionType,
    FunctionType,
    MethodType,
    ModuleType,
    GeneratorType,
    _BaseDataLoaderIter,
)


def check_iterable(loader: Iterable[Any]) -> None:
    """Refuse an iterator over a loader: it has begun, with the generators of another moment.

    Raises:
        ConfigError: it is one, such as ``enumerate(loader)``, or nothing that can be iterated.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ConfigError(f"batches() takes a DataLoader or something else to loop over, not {loader!r}")
    iterators = [loader, *(gc.get_referents(loader) if isinstance(loader, Iterator) else ())]
    iterators += [inner for value in iterators if isinstance(value, tuple) for inner in value]
    if any(isinstance(value, _BaseDataLoaderIter) for value in iterators):
        raise ConfigError(
            f"batches() takes a loader, and this {type(loader).__name__} is an iterator over one that has begun, so "
            "that the order of its batches could not be restored. Write ckpt.batches(loader): ckpt.batch is the number "
            "of the batch. For several loaders at once, pass an object whose __iter__ returns zip(first, second)"
        )


def _walk(loader: Any) -> Iterator[tuple[str, Any]]:
    """Yield a loader and the objects below it with their places, nearest first, as far as there are not too many."""
    waiting = deque([("", loader)])
    visited: set[int] = set()
    while waiting and len(visited) < _MOST_OBJECTS:
        place, value = waiting.popleft()
        if id(value) in visited:
            continue
        visited.add(id(value))
        yield place, value
        if isinstance(value, _OPAQUE) or is_generator(value):
            continue
        if isinstance(value, dict | list | tuple):
            members = value.items() if isinstance(value, dict) else enumerate(value)
            children = [(f"{place}[{key!r}]", child) for key, child in members] if len(value) <= _MOST_ELEMENTS else []
        else:
            children = [(f"{place}.{name}".lstrip("."), child) for name, child in vars_of(value).items()]
        waiting += [(path, child) for path, child in children if child is not None]


def vars_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that has a dictionary of them."""
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def data_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the loader of torch that this one is, or wraps; None when there is none."""
    return next((value for _, value in _walk(loader) if isinstance(value, DataLoader)), None)


def own_generators(loader: Any) -> dict[str, Any]:
    """Return the random generators that belong to a loader, by their places in it: ``sampler.generator``."""
    return {
        place: value
        for place, value in _walk(loader)
        if place and is_generator(value) and not isinstance(value, random.SystemRandom)
    }


def settings_of(loader: Any) -> dict[str, Any]:
    """Return what decides about the batches of a loader, as far as it can be asked."""
    inner = data_loader(loader)
    if inner is None:
        return {"batches": _length(loader), "batch_size": _plain(getattr(loader, "batch_size", None))}
    settings: dict[str, Any] = {
        "batch_size": inner.batch_size,
        "drop_last": inner.drop_last,
        "samples": _length(inner.dataset),
    }
    sampler: Any = inner.sampler if inner.batch_sampler is None else inner.batch_sampler
    names: list[str] = []
    while sampler is not None and len(names) < _MOST_ELEMENTS:
        names.append(type(sampler).__qualname__)
        if inner.batch_size is None:
            settings["batch_size"] = settings["batch_size"] or _plain(getattr(sampler, "batch_size", None))
            settings["drop_last"] = settings["drop_last"] or _plain(getattr(sampler, "drop_last", None))
        sampler = getattr(sampler, "sampler", getattr(sampler, "batch_sampler", None))
    return {
        **settings,
        "sampler": " over ".join(names),
        "num_workers": inner.num_workers,
        "iterable": isinstance(inner.dataset, IterableDataset),
    }


def _plain(value: Any) -> int | str | None:
    return value if isinstance(value, int | str) else None


def _length(value: Any) -> int | None:
    try:
        return len(value) if isinstance(value, Sized) else None
    except (NotImplementedError, TypeError):  # torch's way to say that it has none
        return None


def restores_itself(loader: Any, state: Mapping[str, Any]) -> bool:
    """Whether a loader comes back to its place by itself, since what keeps the place is part of the state."""
    parts = {id(part) for part in state.values() if isinstance(part, Stateful)}
    if id(loader) in parts:
        return True
    inner = data_loader(loader)
    keepers: list[Any] = [] if inner is None else [inner, inner.sampler, inner.batch_sampler]
    if inner is not None and isinstance(inner.dataset, IterableDataset):
        keepers.append(inner.dataset)
    return any(id(keeper) in parts for keeper in keepers)


def keeps_workers(loader: Any) -> bool:
    """Whether the worker processes of a loader stay from one pass to the next."""
    inner = data_loader(loader)
    return inner is not None and inner.persistent_workers and inner.num_workers > 0


def has_kept_workers(loader: Any) -> bool:
    """Whether worker processes of an earlier pass are there for the next."""
    inner = data_loader(loader)
    return inner is not None and keeps_workers(inner) and getattr(inner, "_iterator", None) is not None


def start_workers(loader: Any) -> None:
    """Start the worker processes that a loader keeps, with the random generators left as they are.

    A loader draws one number more in the pass that starts them than in those that follow.
    """
    inner = data_loader(loader)
    if inner is not None and not has_kept_workers(inner):
        generators = own_generators(inner)
        states = take_all(generators)
        iterate_apart(inner)
        restore_all(generators, states)


def take_all(generators: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of generators, by their places."""
    return {place: rng.take_from(generator) for place, generator in generators.items()}


def restore_all(generators: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Set those of the generators whose states are known.

    Raises:
        FormatError: a state is not that of such a generator.
    """
    for place, generator in generators.items():
        if place in states:
            rng.restore_to(generator, states[place])


def seeds_of(generators: Mapping[str, Any]) -> dict[str, int]:
    """Return the seeds of the generators of torch: they change when somebody seeds one anew, not when it draws."""
    torch_generators = {place: value for place, value in generators.items() if isinstance(value, torch.Generator)}
    return {place: generator.initial_seed() for place, generator in torch_generators.items()}


def start_pass(loader: Any, *, itself: bool) -> Iterator[Any]:
    """Return an iterator over all of the data.

    A loader that restores itself draws other numbers in its first ``iter`` after that than it would have drawn without
    a restart, so each of its passes takes exactly one number from the training's generator.
    """
    if not itself:
        batches: Iterator[Any] = iter(loader)
        return batches
    torch.empty((), dtype=torch.int64).random_()  # so that the workers' seeds differ from pass to pass
    return iterate_apart(loader)


def iterate_apart(loader: Any) -> Iterator[Any]:
    """Return ``iter(loader)``, with the random generators of the process left as they are."""
    generators = rng.take()
    batches: Iterator[Any] = iter(loader)
    rng.restore(generators)
    return batches


def continue_pass(loader: Any, place: Batches, data_pass: DataPass, states: Mapping[str, Any]) -> Iterator[Any]:
    """Return an iterator that goes on at a place.

    Args:
        loader: one that does not restore itself.
        place: where the pass was left.
        data_pass: the pass.
        states: the generators of the loader as the checkpoint has them, which they get at the place.

    Raises:
        MismatchError: the data ends before the place, or the loader had a generator of its own and has none now.
        FormatError: the states of the generators cannot be read.
    """
    generators = own_generators(loader)
    for path in data_pass.begin:
        if path not in generators:
            raise MismatchError(
                f"the checkpoint was taken inside an epoch of a loader with a random generator at {path!r}, which "
                "this one lacks; continue with such a loader, since the order of the batches came from that generator"
            )
    process = rng.take()
    rng.restore(place.start)
    if data_pass.reused:
        start_workers(loader)
    restore_all(generators, data_pass.begin)
    batches: Iterator[Any] = iter(loader)
    for number in range(place.done):
        try:
            batch = next(batches)
        except StopIteration as error:
            raise MismatchError(
                f"the checkpoint was taken after batch {place.done} of an epoch, but the loader now ends after "
                f"{number}; continue with the data and batch size that the run was started with"
            ) from error
        if number == 0 and data_pass.first not in (None, digest_of(batch)) and not data_pass.reused:
            warn(
                "the run goes on inside an epoch, and the first batch of this epoch, drawn again, is another one: the "
                "data, its order or what is done to it is not as before, so the rest of the epoch may repeat samples "
                "or leave some out. Continue with the data, the sampler and the seeds that the run was started with, "
                "or from a checkpoint between two epochs"
            )
    rng.restore(process)
    restore_all(generators, states)
    return batches


def settings_differences(earlier: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """List the settings that differ: those that make other batches, and those by which only random numbers differ.

    Those of checkpoints of the first release are not known.
    """
    names = [name for name in earlier if earlier[name] != current.get(name)]
    texts = {name: f"{name} was {earlier[name]} and is {current.get(name)}" for name in names}
    harmless = {"num_workers"} if current.get("iterable") is False else set()
    return [texts[name] for name in names if name not in harmless], [texts[name] for name in names if name in harmless]


# --- the content of a batch ---------------------------------------------------------------------------------------


def digest_of(batch: Any) -> str | None:
    """Return a digest of tensors, arrays, numbers and texts in a batch; of large tensors, of a sample of the elements.

    None when it has none of them.
    """
    digest = hashlib.blake2b(digest_size=16)
    counted = _add(digest, batch, 0)
    return digest.hexdigest() if counted else None


@torch.no_grad()
def _add(digest: "hashlib.blake2b", value: Any, depth: int) -> int:
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest.update(np.ascontiguousarray(value).tobytes())
        return 1
    if isinstance(value, torch.Tensor):
        return _add_tensor(digest, value)
    if isinstance(value, str | bytes | int | float):
        digest.update(repr(value).encode("utf-8", "surrogatepass"))
        return 1
    if depth > _MOST_ELEMENTS:
        return 0
    if isinstance(value, list | tuple):
        return sum(_add(digest, child, depth + 1) for child in value)
    children = value if isinstance(value, Mapping) else vars_of(value)
    return sum(_add(digest, children[name], depth + 1) for name in children)


def _add_tensor(digest: "hashlib.blake2b", tensor: torch.Tensor) -> int:
    if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return 0
    plain = tensor if can_sample(tensor) else tensor.resolve_conj().resolve_neg().contiguous()
    digest.update(repr(tuple(tensor.shape)).encode())
    for elements in Samples([plain], SMALL).take([plain]):
        digest.update(elements.cpu().numpy().tobytes())
    return 1
