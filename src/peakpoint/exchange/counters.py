"""Where scripts and tools keep the epoch and the steps of a checkpoint, and from what they count epochs.

Sources: Lightning, ``trainer/connectors/checkpoint_connector.py`` and ``loops/fit_loop.py``; nnU-Net v2,
``training/nnUNetTrainer/nnUNetTrainer.py``; MMEngine, ``runner/runner.py`` and ``hooks/checkpoint_hook.py``; nanoGPT,
``train.py``; DeepSpeed, ``runtime/engine.py``; fairseq, ``data/iterators.py`` and ``trainer.py``; torchtune,
``training/checkpointing/_utils.py``; torchtitan, ``train.py``.
"""

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from peakpoint.errors import FormatError
from peakpoint.exchange.metric_logs import EPOCH, STEP, STEPS, as_count, as_number, axis_in, readable

_EPOCHS = (  # names in files of tools that are not known; a dot leads one level deeper
    *(EPOCH, "current_epoch", "cur_epoch", "epochs_run", "meta.epoch", "extra_state.train_iterator.epoch"),
    *("train_state.epoch", "trainer.epoch", "trainer_state.epoch", "progress.epoch", "extra_state.epoch"),
)
_STEPS = (
    *(*STEPS, "global_steps", "iter_num", "num_updates", "current_step", "current_iter", "meta.iter", "meta.step"),
    *("train_state.step", "train_state.global_step", "trainer.iteration", "trainer.global_step", "trainer.step"),
    *("trainer_state.global_step", "progress.step", "extra_state.num_updates", "optimizer_history.-1.num_updates"),
)
_USUAL = {"", EPOCH, *STEPS}
_DEEPEST, _MOST = 4, 8  # levels that are searched for numbers to name, and how many are named
_LIKE_COUNTERS = ("epoch", "step", "iter", "update", "batch")


@dataclass(frozen=True, slots=True)
class ToolCounters:
    """The counters of one tool.

    Attributes:
        marks: names that only its files have together.
        epoch: the name of its epoch, "" when it keeps none.
        first: the number that it gives to a checkpoint at the end of the first epoch.
        step: the name of its optimizer steps.
        inside: the name of what it has done in the running epoch: when that is not 0, the epoch is that number less 1.
    """

    tool: str
    marks: tuple[str, ...]
    epoch: str = ""
    first: int = 0
    step: str = ""
    inside: str = ""


_LIGHTNING = ToolCounters("lightning", ("pytorch-lightning_version",), EPOCH, 0, "global_step")
_TOOLS = (
    _LIGHTNING,
    ToolCounters("nnU-Net", ("current_epoch", "trainer_name", "init_args"), "current_epoch", 1),
    ToolCounters("MMEngine", ("meta.mmengine_version",), "meta.epoch", 1, "meta.iter"),
    ToolCounters("MMCV", ("meta.mmcv_version",), "meta.epoch", 1, "meta.iter"),
    ToolCounters("nanoGPT", ("iter_num", "model_args"), step="iter_num"),
    ToolCounters("deepspeed", ("global_steps", "ds_version"), step="global_steps"),
    ToolCounters(
        "fairseq",
        ("extra_state.train_iterator.iterations_in_epoch",),
        "extra_state.train_iterator.epoch",
        2,  # at the end of an epoch, that of the next
        "optimizer_history.-1.num_updates",
        inside="extra_state.train_iterator.iterations_in_epoch",
    ),
    ToolCounters("torchtune", ("epochs_run", "total_epochs"), "epochs_run", 1),
    ToolCounters("torchtitan", ("train_state.step", "train_state.ntokens_seen"), step="train_state.step"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCounters:
    """The epoch and the steps that a file tells.

    Attributes:
        epoch: as the file counts it, but the index from 0 when ``from_zero``.
        complete: whether the epoch was complete.
        from_zero: whether the tool is known, so that the epoch is an index from 0.
        tool: "" when it is not known.
        names: the names at the top of the file that are counters, and no metrics.
        notes: what people should know.
    """

    epoch: int | None = None
    step: int | None = None
    complete: bool = True
    from_zero: bool = False
    tool: str = ""
    names: frozenset[str] = field(default_factory=frozenset)
    notes: tuple[str, ...] = ()


def read_counters(content: Mapping[str, Any], where: str, *, epoch_key: str = "", step_key: str = "") -> FileCounters:
    """Read the counters of a dict that a script or a tool has saved.

    Args:
        where: the file, for errors.
        epoch_key: where the user says that the epoch is; a dot leads one level deeper.
        step_key: where the steps are.

    Raises:
        FormatError: there is no number where the user says.
    """
    tools = (tool for tool in _TOOLS if all(_entry_at(content, mark) is not None for mark in tool.marks))
    tool = next(tools, ToolCounters("", ()))
    epoch_name = _name_of(content, f"{where}: --epoch-key", epoch_key, (tool.epoch,) if tool.epoch else _EPOCHS)
    step_name = _name_of(content, f"{where}: --step-key", step_key, (tool.step,) if tool.step else _STEPS)
    epoch, step = _count_at(content, epoch_name), _count_at(content, step_name)
    counts_by_tool, complete = bool(tool.epoch) and not epoch_key, True
    notes = [f"{axis} from {name}" for axis, name in ((EPOCH, epoch_name), (STEP, step_name)) if name not in _USUAL]
    if counts_by_tool and epoch is not None:
        complete = not _count_at(content, tool.inside)
        epoch -= tool.first if complete else 1
        if tool is _LIGHTNING:
            complete = _entry_at(content, "loops.fit_loop.epoch_loop.batch_progress.is_last_batch") is not False
            epoch -= epoch == _count_at(content, "loops.fit_loop.epoch_progress.current.ready")  # saved after the last
        epoch = None if epoch < 0 else epoch  # the first is not over, or it counts none
        notes += [f"{tool.tool} counts epochs from 1 in it"] if tool.first else []
    if epoch is None and step is None and not counts_by_tool:
        names = list(itertools.islice(_names_like_counters(content), _MOST))
        notes += (
            [f"neither epoch nor step, unless --epoch-key or --step-key says {' or '.join(names)}"] if names else []
        )
    return FileCounters(
        epoch=epoch,
        step=step,
        complete=complete,
        from_zero=counts_by_tool,
        tool=tool.tool,
        names=frozenset({axis_in(content, (EPOCH,)) or "", epoch_name, step_name}),
        notes=tuple(notes),
    )


def _name_of(content: Mapping[str, Any], option: str, user_name: str, usual: Sequence[str]) -> str:
    """Return the name of a counter: the user's, or the first usual one that is a count; "" when there is none."""
    if user_name:
        if _count_at(content, user_name) is None:
            names = list(itertools.islice(_names_like_counters(content), _MOST)) or list(content)
            raise FormatError(f"{option} {user_name}: no whole number is there; the file has {', '.join(names)}")
        return user_name
    spelled = (axis_in(content, (name,)) or name for name in usual)
    return next((name for name in spelled if _count_at(content, name) is not None), "")


def number_of(value: Any) -> float | None:
    """Return a number from a number, or from a tensor or array of one; None from everything else."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.item() if len(value.reshape(-1)) == 1 else None
    return None if isinstance(value, str) else as_number(value)


def _count_at(content: Any, name: str) -> int | None:
    return as_count(number_of(_entry_at(content, name)))


def _entry_at(content: Any, name: str) -> Any:
    """Return what a name leads to; None when there is nothing. A dot may be part of a key or lead one level deeper."""
    if isinstance(content, argparse.Namespace):
        content = vars(content)
    if isinstance(content, list):
        content = {"-1": content[-1]} if content else {}
    if not isinstance(content, dict):
        return None
    if name in content:
        return content[name]
    parts = name.split(".")
    for count in range(1, len(parts)):
        inner = _entry_at(content.get(".".join(parts[:count])), ".".join(parts[count:]))
        if inner is not None:
            return inner
    return None


def _names_like_counters(content: Mapping[Any, Any], above: str = "", depth: int = 1) -> Iterator[str]:
    """Yield the dotted names of whole numbers that may count epochs or steps."""
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and depth < _DEEPEST:
            yield from _names_like_counters(value, f"{name}.", depth + 1)
        elif any(word in str(key).lower() for word in _LIKE_COUNTERS) and as_count(number_of(value)) is not None:
            yield readable(name)
