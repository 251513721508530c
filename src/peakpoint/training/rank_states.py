"""What each rank of a training has for itself: random generators, its place in the data, and its loaders.

A checkpoint has them for every rank, and each rank gets its own back. Where another number of ranks goes on, nobody's
own fits: then the generators are seeded anew, and a place inside an epoch is refused, since other ranks get other
samples.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch

from peakpoint.errors import ConfigError, FormatError, MismatchError
from peakpoint.state import rng
from peakpoint.state.capture import LOOP
from peakpoint.state.parts import Stateful, is_generator, state_of
from peakpoint.state.saved import SavedState
from peakpoint.state.typed_json import Encoder
from peakpoint.training.position import Position


class RankState(msgspec.Struct, frozen=True):
    """What one rank has for itself, as trees.

    Attributes:
        rng: of the generators of the process.
        loop: of the position.
        parts: of the generators and loaders in the state.
    """

    rng: dict[str, Any]
    loop: dict[str, Any]
    parts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RankShare:
    """A checkpoint as one rank restores it.

    Attributes:
        saved: its content.
        missing: one sentence for each thing that does not come back as it was.
        left_out: parts that are not restored.
        seeds: for generators that are parts, by their names.
        generators: of the process, in place of those in the checkpoint; None for these.
    """

    saved: SavedState
    missing: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()
    seeds: Mapping[str, int] = field(default_factory=dict)
    generators: Mapping[str, Any] | None = None


def is_own(value: Any) -> bool:
    """Return whether a part of the state is each rank's own; models, optimizers and the like are the same on all."""
    if isinstance(value, torch.nn.Module):
        return False
    return is_generator(value) or (isinstance(value, Stateful) and isinstance(value, Iterable))


def outline(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the parts of a state, and what the parameters of each are called."""
    return {
        name: sorted(weight for weight, _ in value.named_parameters()) if isinstance(value, torch.nn.Module) else []
        for name, value in state.items()
    }


def check_outlines(outlines: Sequence[Mapping[str, list[str]]]) -> None:
    """Ensure that all ranks train the same: one run has one state.

    Raises:
        ConfigError: a rank has other parts, or a model of it other parameters, than rank 0.
    """
    first = outlines[0]
    for rank, of_rank in enumerate(outlines):
        if of_rank.keys() != first.keys():
            raise ConfigError(
                f"state= has the parts {', '.join(of_rank)} on rank {rank}, and {', '.join(first)} on rank 0: give "
                "every rank the same"
            )
        for part, names in of_rank.items():
            if names != first[part]:
                name = min({*names} ^ {*first[part]})
                where = f"on rank {rank}, not on rank 0" if name in names else f"on rank 0, not on rank {rank}"
                raise ConfigError(
                    f"state[{part!r}] has a parameter {name!r} {where}: a run keeps models that all ranks have, whole "
                    "or divided among them, and none of which each rank has other layers, as in a pipeline"
                )


def check_shards(shards: Sequence[Mapping[str, object]]) -> None:
    """Ensure that what ranks have at the same place of the same tensor is the same; see ``same_shards``.

    Raises:
        ConfigError: it is not.
    """
    owners: dict[str, tuple[int, object]] = {}
    for rank, of_rank in enumerate(shards):
        for place, elements in of_rank.items():
            owner, expected = owners.setdefault(place, (rank, elements))
            if elements != expected:
                raise ConfigError(
                    f"rank {rank} holds other values of {place} than rank {owner}, and one would be lost: a run keeps "
                    "models that all ranks have, whole or divided among them, and none of which each rank has other "
                    "layers or experts under the same names"
                )


def own_state(state: Mapping[str, Any], position: Position) -> dict[str, Any]:
    """Return what this rank has for itself, in plain values and tensors."""
    parts = {name: state_of(value) for name, value in state.items() if is_own(value)}
    for name, part in parts.items():
        Encoder().encode(part, f'state["{name}"]')  # which says where something is that cannot be kept
    return {"rng": rng.take(), "loop": position.as_plain(), "parts": parts}


def for_rank(saved: SavedState, live: Mapping[str, Any], rank: int, size: int, *, strict: bool) -> RankShare:
    """Return a checkpoint as one of ``size`` ranks restores it.

    Raises:
        MismatchError: ``strict``, and another number of ranks was inside an epoch, or had loaders in the state.
        FormatError: what ranks had for themselves cannot be read.
    """
    try:
        rank_states = msgspec.convert(saved.trees.ranks or [], list[RankState])
    except msgspec.ValidationError as error:
        raise FormatError(f"what ranks had for themselves in {saved.manifest.name} cannot be read: {error}") from error
    if len(rank_states) + 1 != size:
        return _for_other_size(saved, live, rank_states, rank, size, strict=strict)
    return RankShare(_of(saved, rank_states[rank - 1]) if rank else saved)


def _of(saved: SavedState, rank_state: RankState) -> SavedState:
    """Return a checkpoint with what a rank had for itself in place of what rank 0 had."""
    trees = replace(
        saved.trees, rng=rank_state.rng, loop=rank_state.loop, parts={**saved.trees.parts, **rank_state.parts}
    )
    tensors = {**saved.tensors, **dict.fromkeys(rank_state.parts, saved.tensors.get(LOOP, {}))}
    return replace(saved, trees=trees, tensors=tensors)


def _for_other_size(
    saved: SavedState, live: Mapping[str, Any], rank_states: list[RankState], rank: int, size: int, *, strict: bool
) -> RankShare:
    goes_on = f"{_processes(size)} {'go' if size > 1 else 'goes'} on"
    sizes = f"{_processes(len(rank_states) + 1)} saved this checkpoint, and {goes_on}"
    own_parts = [name for name, value in live.items() if is_own(value) and name in saved.trees.parts]
    loaders = [name for name in own_parts if not is_generator(live[name])]
    missing = [f"{name}: its place in the data" for name in loaders]
    if saved.trees.loop.get("batches") is not None:
        missing.append(f"the place inside epoch {saved.trees.loop.get('next_epoch')}")
    if missing and strict:
        raise MismatchError(
            f"{sizes}: other ranks get other samples, so a place in the data means nothing to them: "
            f"{'; '.join(missing)}. Continue with {_processes(len(rank_states) + 1)}, or from a checkpoint between two "
            'epochs (resume="RUN:epoch=N") with no loader in state=; with strict=False the epoch begins anew',
            tuple(missing),
        )
    if saved.trees.rng:
        missing.append(
            "the random generators: each rank's are seeded anew, from those of rank 0 and the number of ranks"
        )
    everyones = [saved, *(_of(saved, rank_state) for rank_state in rank_states)]
    shared = {name for name in own_parts if len({_content(state, name) for state in everyones}) == 1}
    position = {**saved.trees.loop, "passes": [], "batches": None}
    trees = replace(saved.trees, loop=position, optional=saved.trees.optional.union(loaders))
    return RankShare(
        replace(saved, trees=trees),
        tuple(f"{sentence} ({sizes})" for sentence in missing),
        frozenset(loaders),
        {name: _seed(saved, name, size, rank) for name in own_parts if name not in {*loaders, *shared}},
        rng.seeded(_seed(saved, "", size, rank)) if saved.trees.rng else None,
    )


def _processes(size: int) -> str:
    return f"{size} process{'es' if size > 1 else ''}"


def _content(saved: SavedState, part: str) -> bytes:
    """Return the content of a part, to be compared."""
    encoder = Encoder()
    tree = encoder.encode(saved.value(part), part)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in encoder.tensors.items()}
    return msgspec.msgpack.encode((tree, tensors))


def _seed(saved: SavedState, part: str, size: int, rank: int) -> int:
    """Return the first 63 bits of the SHA-256 of rank 0's generators, the part's name, the size and the rank."""
    text = msgspec.json.encode([saved.trees.rng, part, size, rank], order="sorted")
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1
