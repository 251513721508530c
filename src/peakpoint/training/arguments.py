"""The arguments of a checkpointer, and what to write in place of those that cannot work."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.format.names import check_text, did_you_mean
from peakpoint.repository.refs import is_run
from peakpoint.rules import Budget, Rule, check_rules
from peakpoint.rules.stopping import EarlyStopping
from peakpoint.state.json_scalars import kind_of
from peakpoint.training.preemption import Preempt

_RESUME = 'resume= takes "auto", "must", "never" or a ref such as "RUN:epoch=3"'
_RESUMES = ("auto", "must", "never")
_INSTEAD = {True: 'write resume="must"', False: 'write resume="never"', None: 'write resume="auto"'}
ON_SAVE_ERROR = ("raise", "warn")


def check_keep(keep: object) -> tuple[Rule, ...]:
    """Return the argument ``keep``.

    Raises:
        ConfigError: it is no list of rules, or none of them would keep anything.
    """
    checked = check_rules(keep)
    if all(isinstance(rule, Budget) for rule in checked):
        problem = "has nothing but a budget, which" if checked else "is empty, and"
        raise ConfigError(f"keep= {problem} keeps no checkpoint: add a rule that does, such as keep=[pp.Last(1)]")
    return checked


def check_resume(resume: object, run: str) -> str:
    """Return the argument ``resume``.

    Raises:
        ConfigError: it is no text, or neither a word that it takes nor a ref.
    """
    if isinstance(resume, str):
        if resume in _RESUMES or not is_run(resume):
            return resume
        hint = did_you_mean(resume.lower(), _RESUMES)
        if resume in ("best", "last", "latest"):
            hint = f'; write resume="{run}@{resume}"'
    else:
        hint = f"; {_INSTEAD[resume]}" if resume is None or isinstance(resume, bool) else ""
    raise ConfigError(f"{_RESUME}, not {resume!r}{hint}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> Any:
    """Return an argument that is one of some texts.

    Raises:
        ConfigError: it is not.
    """
    if value in choices:
        return value
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise ConfigError(f"{name}= takes {' or '.join(map(repr, choices))}, not {value!r}{hint}")


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigError: names the argument.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name}= takes True or False, not {value!r}")


def check_objects(root: object, name: object, stop: object, preempt: object) -> None:
    """Refuse other kinds of objects than these arguments take.

    Raises:
        ConfigError: says what to write.
    """
    if not isinstance(root, str | os.PathLike) and not hasattr(root, "create"):
        raise ConfigError(f'the first argument is the repository, a directory such as "runs" or a store, not {root!r}')
    if not isinstance(name, str):
        raise ConfigError(f'name= takes a template such as "epoch{{epoch}}_step{{step}}", not {name!r}')
    if not (stop is None or isinstance(stop, EarlyStopping)):
        raise ConfigError(f'stop= takes pp.EarlyStopping("val_loss", "min"), for example, not {stop!r}')
    if not (preempt is None or isinstance(preempt, Preempt)):
        raise ConfigError(f"preempt= takes pp.Preempt(), or None to watch no signals, not {preempt!r}")


def named_metrics(metrics: object, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metrics of a report.

    Raises:
        ConfigError: they have no names.
    """
    if metrics is None:
        return keywords
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"report() takes metrics by name, such as report(loss=0.5) or report({{'val/loss': 0.5}}), not "
            f"a {kind_of(metrics)} without a name"
        )
    return {**metrics, **keywords}


def check_reason(reason: object) -> str:
    """Return the reason of a save on request.

    Raises:
        ConfigError: it is no text, or empty.
    """
    if not isinstance(reason, str) or not reason.strip():
        raise ConfigError(
            'save() needs a reason, such as save("end of warmup"): it tells you later why this checkpoint was saved'
        )
    return check_text("the reason of a save", reason)
