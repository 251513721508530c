"""A checkpoint of another tool as one record, made from the dict that a script has saved."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peakpoint.errors import ConfigError, FormatError
from peakpoint.exchange.counters import number_of, read_counters
from peakpoint.exchange.generators import generators_in
from peakpoint.exchange.metric_logs import LogRow, as_count, metric_name, metric_names, readable
from peakpoint.exchange.part_names import find_parts, is_optimizer, is_weights
from peakpoint.exchange.pickle_builder import Unbuilt
from peakpoint.exchange.pickles import check_inert
from peakpoint.exchange.pruning import Pruning, sentences
from peakpoint.format import names
from peakpoint.format.manifest import FileRecord
from peakpoint.format.names import EXTRA
from peakpoint.state.typed_json import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What a user says of the files.

    Attributes:
        parts: names in the file to names of parts, besides the usual ones; ``"extra"`` for what is not a part.
        strip_prefix: taken from the names of a model's tensors.
        inert: see ``pickles.load``.
        epochs_from: the number that the file gives to the first epoch, 0 or 1; known tools have their own.
        epoch_key: where in the file the epoch is, "" to look under the usual names; a dot leads one level deeper.
        step_key: where the steps are.

    Raises:
        ConfigError: one of these is wrong.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    strip_prefix: str = ""
    inert: Collection[str] = ()
    epochs_from: int = 0
    epoch_key: str = ""
    step_key: str = ""

    def __post_init__(self) -> None:
        check_inert(self.inert)
        if self.epochs_from not in (0, 1):
            raise ConfigError(f"epochs_from={self.epochs_from!r}: the first epoch is 0 or 1")
        for part in self.parts.values():
            names.check_part(part)
        targets = [part for part in self.parts.values() if part != EXTRA]
        if len(set(targets)) < len(targets):
            raise ConfigError(f"two names become one part: {', '.join(self.parts.values())}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignCheckpoint:
    """A checkpoint of another tool, read.

    Attributes:
        tool: what wrote it, as far as can be told.
        epoch: the epoch's index from 0, None when no file has it.
        step: optimizer steps completed, None when no file has them.
        complete: whether the epoch was complete.
        from_zero: whether the epoch is known to count from 0, whatever ``epochs_from`` says.
        metrics: of the moment.
        parts: part name to state dict.
        extra: everything else, unchanged.
        generators: the states of the random generators, as ``rng.pack`` returns them.
        rows: the history of metrics in the same files.
        notes: what became of the contents, a sentence each.
        optimizer: the optimizer's name as the file gives it, "" when it does not.
        stripped: how many names of tensors were shortened.
        linkable: a safetensors file that is the whole part ``model``, with the bytes before its tensors.
    """

    tool: str
    epoch: int | None = None
    step: int | None = None
    complete: bool = True
    from_zero: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    generators: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[LogRow, ...] = ()
    notes: tuple[str, ...] = ()
    optimizer: str = ""
    stripped: int = 0
    linkable: tuple[Path, FileRecord] | None = None


def from_dict(content: Any, path: Path, options: ReadOptions) -> ForeignCheckpoint:
    """Make a checkpoint of what a script has passed to ``torch.save``.

    Raises:
        FormatError: it is not a dict with tensors.
    """
    _check_dict(content, path)
    if is_weights(content):
        bare = ForeignCheckpoint(tool="torch.save", parts={"model": content}, notes=("all of it -> model",))
        return renamed(bare, path, options)
    lightning = "pytorch-lightning_version" in content
    generators, content, notes = _without_generators(content, options)
    parts, part_names, extra = find_parts(content, _averaged_names(content) | dict(options.parts))
    _add_listed_parts(parts, part_names, extra)
    if not parts:
        raise FormatError(f"{path} {_why_no_parts(content)}")
    counters = read_counters(content, str(path), epoch_key=options.epoch_key, step_key=options.step_key)
    step = counters.step
    metrics, of_metrics = _metrics(extra, counters.names)
    notes = [f"{key} -> {part}" for key, part in part_names.items()] + [*notes, *counters.notes, *of_metrics]
    candidates = [key for key, part in part_names.items() if is_weights(parts.get(part))]
    if "model" not in parts and candidates:
        notes.append(f"no part is the model: --part NAME=model makes one of {', '.join(candidates)} it")
    if lightning:
        metrics |= _lightning_scores(extra, path.name)
    if step is None:
        step = steps_of(parts.get("optimizer"))
        notes += [] if step is None else [f"step {step} from the optimizer's state"]
    return ForeignCheckpoint(
        tool=tool_name(counters.tool or "torch.save", content.get("pytorch-lightning_version")),
        epoch=counters.epoch,
        step=step,
        complete=counters.complete,
        from_zero=counters.from_zero,
        metrics=metrics,
        parts=parts,
        extra=extra,
        generators=generators,
        notes=tuple(notes),
        optimizer=_optimizer_name(extra),
    )


def tool_name(name: str, version: Any) -> str:
    """Return the name of a tool, with its version if that is one: it becomes a part of the reason of a checkpoint."""
    return f"{name} {readable(version)[:40]}" if isinstance(version, str) and version else name


def _check_dict(content: Any, path: Path) -> None:
    """Refuse what is no dict with state dicts, or with tensors."""
    if isinstance(content, Unbuilt):
        raise FormatError(f"{path} was not loaded: it holds {_whole_object(content)}")
    if not isinstance(content, dict) or not content:
        kind = "an empty dict" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise FormatError(f"{path} holds {kind}, and not a dict with state dicts")
    if is_optimizer(content):
        raise FormatError(
            f"{path} holds the state of an optimizer and no model: save both in one file, as in "
            "torch.save({'model': MODEL.state_dict(), 'optimizer': OPTIMIZER.state_dict()}, FILE)"
        )
    if not is_weights(content) and not all(isinstance(key, str) for key in content):
        raise FormatError(f"{path} holds a dict whose keys are not text")


def _why_no_parts(content: Mapping[str, Any]) -> str:
    objects = [f"{key} is {_whole_object(value)}" for key, value in content.items() if isinstance(value, Unbuilt)]
    if objects:
        return f"was not loaded: it holds no state dict: {'; '.join(objects)}"
    return (
        f"holds no state dict; it has {', '.join(content)}: name one with --part NAME=model, or with "
        "--part NAME.DEEPER=model where it is deeper"
    )


def _whole_object(value: Unbuilt) -> str:
    """Return what an object is that was saved whole, and what to do."""
    return (
        f"a whole {value.name}, which needs the code of its class; if you trust it, load it where that can be "
        "imported, in an environment without anything to lose, and torch.save({'model': MODEL.state_dict()}, FILE)"
    )


def _averaged_names(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts of Lightning's ``WeightAveraging``: what is trained is not its ``state_dict``, but beside it."""
    return {"current_model_state": "model", "state_dict": "ema"} if "current_model_state" in content else {}


def _without_generators(
    content: Mapping[str, Any], options: ReadOptions
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the states of the random generators, what remains of a dict, and a note on them."""
    generators, leftovers = generators_in(content, options.parts)
    remaining = {
        key: leftovers.get(key, value) for key, value in content.items() if leftovers.get(key, ...) is not None
    }
    return generators, remaining, [f"{', '.join(leftovers)} -> random generators"] if leftovers else []


def renamed(checkpoint: ForeignCheckpoint, path: Path, options: ReadOptions) -> ForeignCheckpoint:
    """Return a checkpoint whose parts have no names of their own in the file, with those of the options.

    Raises:
        FormatError: a part of that name does not exist.
    """
    for name, part in options.parts.items():
        if name not in checkpoint.parts:
            raise FormatError(f"--part {name}={part}: {path} has no {name!r}; it has {', '.join(checkpoint.parts)}")
    new_names = {name: options.parts.get(name, name) for name in checkpoint.parts}
    parts = {part: checkpoint.parts[name] for name, part in new_names.items() if part != EXTRA}
    if len(parts) < sum(part != EXTRA for part in new_names.values()):
        raise FormatError(f"--part makes two parts of {path} the same: {', '.join(new_names.values())}")
    extra = {**checkpoint.extra, **{name: checkpoint.parts[name] for name, part in new_names.items() if part == EXTRA}}
    same_model = parts.get("model") is checkpoint.parts.get("model")
    return replace(checkpoint, parts=parts, extra=extra, linkable=checkpoint.linkable if same_model else None)


def _metrics(extra: Mapping[str, Any], counters: Collection[str]) -> tuple[dict[str, float], list[str]]:
    """Return the metrics among what is no part, and notes on them and on everything else."""
    numbers = {key: number for key, value in extra.items() if (number := number_of(value)) is not None}
    values = {key: number for key, number in numbers.items() if key not in counters}
    for key in ("metrics", "scores", "results"):
        if isinstance(extra.get(key), dict):
            for name, number in _flat(extra[key]):
                agrees = values.get(name, number) == number
                values[name if agrees else f"{key}/{name}"] = number
    names_of = metric_names(values)
    metrics = {names_of[key]: value for key, value in values.items()}
    best = [name for name in metrics if name.startswith("best")]
    notes = [f"{name} is the best so far, and kept under this name" for name in best]
    unread = [key for key in extra if key not in numbers]
    notes += [f"{', '.join(unread)} -> {EXTRA}"] if unread else []
    return metrics, notes


def _flat(scores: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in scores.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif (number := number_of(value)) is not None:
            yield f"{prefix}{key}", number


def steps_of(optimizer: Any) -> int | None:
    """Return the steps that an optimizer's state counts, None when it does not."""
    if not is_optimizer(optimizer) or not isinstance(optimizer["state"], dict):
        return None
    states = [state for state in optimizer["state"].values() if isinstance(state, dict)]
    counts = [count for state in states if (count := as_count(number_of(state.get("step")))) is not None]
    return max(counts, default=None)


def _optimizer_name(extra: Mapping[str, Any]) -> str:
    for key in ("args", "hyper_parameters", "hparams", "config", "cfg", "opt"):
        options = extra.get(key)
        options = options if isinstance(options, dict) else getattr(options, "__dict__", {})
        for name in ("optimizer", "optim", "opt", "optimizer_name"):
            if isinstance(options.get(name), str):
                return readable(options[name])[:100]
    return ""


def _add_listed_parts(parts: dict[str, Any], part_names: dict[str, str], extra: dict[str, Any]) -> None:
    """Add the states of optimizers and schedulers that are in lists, as Lightning keeps them."""
    for part, keys in (
        ("optimizer", ("optimizer_states", "optimizers")),
        ("scheduler", ("lr_schedulers", "schedulers")),
    ):
        for key in keys:
            states = extra.get(key)
            if part in parts or not isinstance(states, list) or not states:
                continue
            if all(is_optimizer(state) if part == "optimizer" else isinstance(state, dict) for state in states):
                names = [part] if len(states) == 1 else [f"{part}_{number}" for number in range(len(states))]
                parts |= dict(zip(names, states, strict=True))
                part_names[key] = ", ".join(names)
                del extra[key]


def _lightning_scores(extra: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return what ``ModelCheckpoint`` has: the value of this file if it is among its best, and the best so far."""
    scores: dict[str, float] = {}
    callbacks = extra.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and isinstance(state.get("monitor"), str):
            monitor = metric_name(state["monitor"])
            best = number_of(state.get("best_model_score"))
            if best is not None:
                scores[f"best_{monitor}"] = best
            best_models = state.get("best_k_models")
            for path, score in best_models.items() if isinstance(best_models, dict) else ():
                if Path(str(path)).name == name and (value := number_of(score)) is not None:
                    scores[monitor] = value
    return scores


def storable(checkpoint: ForeignCheckpoint) -> tuple[ForeignCheckpoint, list[str]]:
    """Return what can be stored exactly, and a note on everything that cannot, which is left out.

    Of the model nothing is left out but what a module has added by ``get_extra_state``, the other parts are left out as
    a whole, and of what is no part, single values are.

    Raises:
        FormatError: a value of the model was not built from the file.
        ConfigError: the model cannot be stored exactly.
    """
    parts, extra, notes = dict(checkpoint.parts), dict(checkpoint.extra), []
    for part, value in checkpoint.parts.items():
        names.check_part(part)
        if part == "model":
            notes += _without_extra_state(value)
        try:
            _check_part(part, value)
        except (ConfigError, FormatError) as error:
            if part == "model" or len(parts) == 1:
                raise
            del parts[part]
            notes.append(f"LEFT OUT: the part {part}: {error}")
    pruning = Pruning()
    pruning.prune(extra, EXTRA)
    notes += [f"LEFT OUT: {sentence}" for sentence in sentences(pruning.gaps)]
    for key, value in list(extra.items()):
        try:
            Encoder().encode(value, f'{EXTRA}["{key}"]')
        except ConfigError as error:
            del extra[key]
            notes.append(f"LEFT OUT: {error}")
    return replace(checkpoint, parts=parts, extra=extra), notes


def _check_part(part: str, value: Any) -> None:
    pruning = Pruning()
    gaps = [gap for gap in (pruning.prune(value, part), *pruning.gaps) if gap is not None]
    if gaps:
        raise FormatError("; ".join(sentences(gaps)))
    Encoder().encode(value, f'state["{part}"]')


def _without_extra_state(model: dict[str, Any]) -> list[str]:
    """Take what was not built out of what modules have added to their state; returns notes."""
    notes = []
    for key in [key for key in model if str(key).endswith("_extra_state")]:
        pruning = Pruning()
        gap = pruning.prune(model[key], f'model["{key}"]')
        if gap is not None or pruning.gaps:
            notes += [f"LEFT OUT: {sentence}" for sentence in sentences([gap] if gap else pruning.gaps)]
            del model[key]
    return notes
