"""A checkpoint of another tool as one kind of record, and how it is made from the dict that a script has saved."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peakpoint.errors import ConfigError, FormatError
from peakpoint.exchange.metric_logs import EPOCH, STEPS, Row, as_number, metric_name, readable, whole
from peakpoint.format import names
from peakpoint.format.manifest import FileRecord
from peakpoint.state.typed_json import Encoder

EXTRA = "extra"
_NO_PART = re.compile(r"^[^A-Za-z0-9_]+|[^A-Za-z0-9_.-]+")
_KNOWN = {  # the names that scripts use, the first that is there and is one counts
    "model": ("model_state_dict", "state_dict", "model_state", "model", "net", "network", "weights"),
    "optimizer": ("optimizer_state_dict", "optimizer_state", "optimizer", "optim", "optim_state_dict"),
    "scheduler": ("scheduler_state_dict", "lr_scheduler_state_dict", "scheduler", "lr_scheduler"),
    "scaler": ("scaler_state_dict", "grad_scaler", "scaler"),
    "ema": ("ema_state_dict", "model_ema", "state_dict_ema", "ema"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How to read.

    Attributes:
        parts: names in the file to names of parts, besides those that are known; ``"extra"`` makes it none.
        strip_prefix: taken from the names of a model's tensors.
        inert: see ``pickles.load``.
        epochs_from: the number that the file gives to the first epoch, 0 or 1.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    strip_prefix: str = ""
    inert: Collection[str] = ()
    epochs_from: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A checkpoint of another tool, read.

    Attributes:
        tool: what wrote it, as far as can be told.
        epoch: the epoch's index from 0, None when it does not say.
        step: optimizer steps completed, None when it does not say.
        complete: whether the epoch was complete.
        metrics: of the moment.
        parts: part name to state dict.
        extra: everything that is no part, as it was.
        rows: the history of metrics that came with it.
        notes: what became of what, a sentence each.
        optimizer: the optimizer's name as the file gives it, "" when it does not.
        stripped: how many names of tensors were shortened.
        linkable: a safetensors file that is the whole part ``model``, with the bytes before its tensors.
    """

    tool: str
    epoch: int | None = None
    step: int | None = None
    complete: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    optimizer: str = ""
    stripped: int = 0
    linkable: tuple[Path, FileRecord] | None = None


def from_dict(given: Any, where: Path, how: Reading) -> Foreign:
    """A checkpoint from what a script has given to ``torch.save``.

    Raises:
        FormatError: it is no dict with tensors.
    """
    if not isinstance(given, dict) or not given:
        raise FormatError(f"{where} holds a {type(given).__name__}, and not a dict with state dicts")
    if is_weights(given):
        return renamed(Foreign(tool="torch.save", parts={"model": given}, notes=("all of it -> model",)), where, how)
    if not all(isinstance(key, str) for key in given):
        raise FormatError(f"{where} holds a dict whose keys are no text")
    lightning = "pytorch-lightning_version" in given
    parts, named = _parts(given, how)
    if lightning:
        _add_lightning_parts(given, parts, named)
    if not parts:
        raise FormatError(f"{where} holds no state dict; it has {', '.join(given)}: name one with --part NAME=model")
    extra = {key: value for key, value in given.items() if key not in named}
    epoch, step, metrics, notes = _numbers(extra)
    notes = [f"{key} -> {part}" for key, part in named.items()] + notes
    complete = True
    if lightning:
        metrics |= _lightning_scores(extra, where.name)
        complete = _lightning_complete(extra)
    if step is None:
        step = steps_of(parts.get("optimizer"))
        notes += [] if step is None else [f"step {step} from the optimizer's state"]
    return Foreign(
        tool=f"lightning {given['pytorch-lightning_version']}" if lightning else "torch.save",
        epoch=epoch,
        step=step,
        complete=complete,
        metrics=metrics,
        parts=parts,
        extra=extra,
        notes=tuple(notes),
        optimizer=_optimizer_name(extra),
    )


def renamed(found: Foreign, where: Path, how: Reading) -> Foreign:
    """Give parts other names, of files that name no parts themselves.

    Raises:
        FormatError: there is no such part.
    """
    parts, extra = dict(found.parts), dict(found.extra)
    for name, part in how.parts.items():
        if name not in found.parts:
            raise FormatError(f"--part {name}={part}: {where} has no {name!r}; it has {', '.join(found.parts)}")
        (extra if part == EXTRA else parts)[name if part == EXTRA else part] = parts.pop(name)
    kept = found.linkable if parts.get("model") is found.parts.get("model") else None
    return replace(found, parts=parts, extra=extra, linkable=kept)


def is_weights(value: Any) -> bool:
    """Whether it is a dict of tensors and nothing else."""
    return isinstance(value, dict) and bool(value) and all(isinstance(child, torch.Tensor) for child in value.values())


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()


def _fits(part: str, value: Any) -> bool:
    if part in {"model", "ema"}:
        return isinstance(value, dict) and any(isinstance(child, torch.Tensor) for child in value.values())
    return _is_optimizer(value) if part == "optimizer" else isinstance(value, dict)


def _parts(given: Mapping[str, Any], how: Reading) -> tuple[dict[str, Any], dict[str, str]]:
    """The parts, and the names in the file with the parts that they became."""
    for key in how.parts:
        if key not in given:
            raise FormatError(f"--part {key}={how.parts[key]}: the file has no {key!r}; it has {', '.join(given)}")
    named = {key: part for key, part in how.parts.items() if part != EXTRA}
    for part, usual in _KNOWN.items():
        free = [name for name in usual if name in given and name not in how.parts and _fits(part, given[name])]
        if free and part not in named.values():
            named[free[0]] = part
    for key, value in given.items():
        if key not in named and key not in how.parts and (is_weights(value) or _is_optimizer(value)):
            named[key] = _part_name(key)
    return {part: _with_numbers(part, given[key]) for key, part in named.items()}, named


def _part_name(key: str) -> str:
    """A name of the file's as the name of a part."""
    name = _NO_PART.sub("_", key)[:60].rstrip(".") or "part"
    return f"my_{name}" if name in {EXTRA, "state", "manifest", "rng", "loop"} else name


def _with_numbers(part: str, value: Any) -> Any:
    """An optimizer's state whose parameters are numbers again: torch.distributed.checkpoint makes them text."""
    if part != "optimizer" or not value["state"] or not all(str(key).isdecimal() for key in value["state"]):
        return value
    return {**value, "state": {int(key): moments for key, moments in value["state"].items()}}


def _numbers(extra: Mapping[str, Any]) -> tuple[int | None, int | None, dict[str, float], list[str]]:
    """Epoch, step, metrics, and what was made of them."""
    values = {key: number for key, value in extra.items() if (number := _number(value)) is not None}
    epoch = whole(values.pop(EPOCH, None))
    found = next((name for name in STEPS if name in values), None)
    step = None if found is None else whole(values.pop(found))
    metrics = {metric_name(key): value for key, value in values.items()}
    for key in ("metrics", "scores", "results"):
        if isinstance(extra.get(key), dict):
            metrics |= dict(_flat(extra[key]))
    best = [name for name in metrics if name.startswith("best")]
    notes = [f"{name} is the best so far, and kept under this name" for name in best]
    others = [key for key in extra if key not in values and key not in {EPOCH, *STEPS}]
    notes += [f"{', '.join(others)} -> {EXTRA}"] if others else []
    return epoch, step, metrics, notes


def _flat(given: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in given.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif (number := _number(value)) is not None:
            yield metric_name(f"{prefix}{key}"), number


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.item() if len(value.reshape(-1)) == 1 else None
    return None if isinstance(value, str) else as_number(value)


def steps_of(optimizer: Any) -> int | None:
    """The steps that an optimizer's state counts, None when it does not."""
    if not _is_optimizer(optimizer) or not isinstance(optimizer["state"], dict):
        return None
    moments = [one for one in optimizer["state"].values() if isinstance(one, dict)]
    counts = [count for one in moments if (count := whole(_number(one.get("step")))) is not None]
    return max(counts, default=None)


def _optimizer_name(extra: Mapping[str, Any]) -> str:
    for key in ("args", "hyper_parameters", "hparams", "config", "cfg", "opt"):
        options = extra.get(key)
        options = options if isinstance(options, dict) else getattr(options, "__dict__", {})
        for name in ("optimizer", "optim", "opt", "optimizer_name"):
            if isinstance(options.get(name), str):
                return readable(options[name])[:100]
    return ""


def _add_lightning_parts(given: Mapping[str, Any], parts: dict[str, Any], named: dict[str, str]) -> None:
    for key, part in (("optimizer_states", "optimizer"), ("lr_schedulers", "scheduler")):
        states = given.get(key)
        if isinstance(states, list) and states:
            names = [part] if len(states) == 1 else [f"{part}_{number}" for number in range(len(states))]
            parts |= dict(zip(names, states, strict=True))
            named[key] = ", ".join(names)


def _lightning_scores(extra: Mapping[str, Any], name: str) -> dict[str, float]:
    """What ``ModelCheckpoint`` knows: the value of this file if it is among its best, and the best so far."""
    found: dict[str, float] = {}
    callbacks = extra.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and isinstance(state.get("monitor"), str):
            monitor = metric_name(state["monitor"])
            best = _number(state.get("best_model_score"))
            if best is not None:
                found[f"best_{monitor}"] = best
            for path, score in dict(state.get("best_k_models") or {}).items():
                if Path(str(path)).name == name and (value := _number(score)) is not None:
                    found[monitor] = value
    return found


def _lightning_complete(extra: Mapping[str, Any]) -> bool:
    try:
        return bool(extra["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"])
    except (KeyError, TypeError):
        return True


def keepable(found: Foreign) -> tuple[Foreign, list[str]]:
    """What can be kept exactly; a part that cannot is refused, an extra that cannot is left out and named."""
    for part, value in found.parts.items():
        Encoder().encode(value, f'state["{names.check_part(part)}"]')
    extra, dropped = dict(found.extra), []
    for key, value in found.extra.items():
        try:
            Encoder().encode(value, f'{EXTRA}["{key}"]')
        except ConfigError as error:
            del extra[key]
            dropped.append(f"LEFT OUT: {error}")
    return replace(found, extra=extra), dropped
