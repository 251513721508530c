"""Optimizers and schedulers: whether a saved state belongs to a live one, and how an optimizer gets it.

torch's ``load_state_dict`` takes the settings and moments of any class, by position; a mistake shows at the next step,
or never. So classes, settings and names of parameters are compared before.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from peakpoint.state.device_copy import send
from peakpoint.state.modules import describe
from peakpoint.state.origin import NO_ORIGIN, PartOrigin, class_names, names_by_group, plain_name, unwrapped
from peakpoint.state.step_guard import stepping

_ELEMENTWISE = {"acc_delta", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq"}
_ELEMENTWISE |= {"momentum_buffer", "square_avg", "sum"}
_REQUIRED_MOMENTS: dict[str, AbstractSet[str]] = {  # of a parameter that has any: step() reads them
    "ASGD": {"eta", "mu", "ax"},
    "Adadelta": {"square_avg", "acc_delta"},
    "Adagrad": {"sum"},
    "Adam": {"exp_avg", "exp_avg_sq"},
    "Adamax": {"exp_avg", "exp_inf"},
    "NAdam": {"exp_avg", "exp_avg_sq", "mu_product"},
    "RAdam": {"exp_avg", "exp_avg_sq"},
    "RMSprop": {"square_avg"},
    "Rprop": {"prev", "step_size"},
}
_TELLING = {"alpha", "betas", "dampening", "eps", "etas", "lambd", "lr_decay", "momentum", "rho"}  # what class it is of
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}  # put into groups


# --- comparing ------------------------------------------------------------------------------------------------------


def optimizer_differences(
    part: str, live: torch.optim.Optimizer, saved: Any, origin: PartOrigin, names: Mapping[int, str]
) -> list[str]:
    """List what keeps a saved state from fitting an optimizer: class, settings, groups, parameters, moments.

    Args:
        names: of the live parameters, by identity; see ``parameter_names``.
    """
    if not is_optimizer_state(saved):
        wraps = stepping(live) is not live  # and may have a state of its own form
        return [] if wraps else [f"{part}: the checkpoint has no optimizer state under this name"]
    live = unwrapped(live)
    saved, live_names, saved_names = _in_live_order(live, saved, origin, names)
    groups = saved["param_groups"]
    lines = _class_differences(part, live, saved, origin)
    if len(groups) != len(live.param_groups):
        count = f"{len(groups)} parameter groups in the checkpoint and {len(live.param_groups)} in the optimizer"
        return [*lines, f"{part}: {count}"]
    sizes = [
        f"{part}: group {number} has {len(saved_group['params'])} parameters in the checkpoint "
        f"and {len(group['params'])} in the optimizer"
        for number, (saved_group, group) in enumerate(zip(groups, live.param_groups, strict=True))
        if len(saved_group["params"]) != len(group["params"])
    ]
    if lines or sizes:
        return [*lines, *sizes]
    return _moment_differences(part, live, saved, names) or _misplaced(part, live_names, saved_names)


def is_optimizer_state(saved: Any) -> bool:
    """Return whether a state has the form that torch's optimizers give it."""
    return isinstance(saved, Mapping) and {"state", "param_groups"} <= saved.keys()


def _class_differences(part: str, live: torch.optim.Optimizer, saved: Any, origin: PartOrigin) -> list[str]:
    """Compare the class when the checkpoint tells it, and the settings and moments that ``step()`` reads."""
    classes = class_names(live)
    settings = {name for group in saved["param_groups"] for name in group} - _OF_SCHEDULERS - {"params", "param_names"}
    completed = _completed(live, saved)
    lacking = [name for name in live.defaults if any(name not in group for group in completed)]
    required = next((_REQUIRED_MOMENTS[name] for name in map(_last, classes) if name in _REQUIRED_MOMENTS), frozenset())
    moments = [set(values) for values in saved["state"].values() if isinstance(values, Mapping) and values]
    absent = sorted({name for names in moments for name in required - names})
    unrelated = bool(origin.classes) and not _related(classes, origin.classes)
    if unrelated and (settings != set(live.defaults) or all(map(_of_torch, (classes[0], origin.classes[0])))):
        why = f" (it has no {', '.join(lacking)})" if lacking else ""
        line = (
            f"{part}: it was saved from another kind of optimizer, {origin.classes[0]}: {classes[0]} cannot go on from"
        )
        return [f"{line} that state{why}"]
    if classes[:1] == origin.classes[:1]:
        return []
    surplus = not origin.classes and (settings & _TELLING) - live.defaults.keys()
    if surplus or lacking:
        need = f"settings {', '.join(live.defaults)}, and the checkpoint has {', '.join(sorted(settings))}"
    elif absent:
        need = f"moments {', '.join(absent)}, and the checkpoint has {', '.join(sorted(map(str, moments[0])))}"
    else:
        return []
    return [f"{part}: {classes[0]} needs the {need}: it was saved from another kind of optimizer"]


def _related(live: Sequence[str], saved: Sequence[str]) -> bool:
    """Whether one class is the other, is derived from it, or has its name and has been moved."""
    return bool({*live} & {*saved}) or _last(live[0]) == _last(saved[0])


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _of_torch(name: str) -> bool:
    return name.startswith("torch.")


def _completed(optimizer: torch.optim.Optimizer, saved: Any) -> list[dict[str, Any]]:
    """Return the saved groups with the settings that the class gives to states that are older than these."""
    if stepping(optimizer) is None:
        return list(saved["param_groups"])  # a wrapper, whose class torch would make one with hooks
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(vars(optimizer), defaults=dict(optimizer.defaults))
    groups = [{**group, "params": []} for group in saved["param_groups"]]
    trial.__setstate__({"state": defaultdict(dict), "param_groups": groups})
    return trial.param_groups


def _moment_differences(part: str, live: torch.optim.Optimizer, saved: Any, names: Mapping[int, str]) -> list[str]:
    lines = []
    for index, parameter in _parameters_by_index(live, saved).items():
        moments = saved["state"].get(index)
        if is_lazy(parameter):
            if id(parameter) not in names:
                lines.append(
                    f"{part}: parameter {index} is not initialized yet: run one batch through the model before, or "
                    "restore the model together with its optimizer"
                )
            continue
        for name, value in moments.items() if isinstance(moments, Mapping) else ():
            wrong = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape != parameter.shape
            if wrong and name in _ELEMENTWISE:
                lines.append(
                    f"{part}: {name} of parameter {index} is {describe(value)} in the checkpoint "
                    f"for a parameter of {list(parameter.shape)}"
                )
    return lines


def _parameters_by_index(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
    """Return an optimizer's parameters by the index that a saved state gives them."""
    groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    return {
        index: parameter
        for saved_group, group in groups
        for index, parameter in zip(saved_group["params"], group["params"], strict=False)
    }


def scheduler_differences(part: str, live: Any, saved: Any, origin: PartOrigin) -> list[str]:
    """List what keeps a saved state from fitting a scheduler, which takes any: its class, or else its settings."""
    if not isinstance(saved, Mapping):
        return [f"{part}: the checkpoint has no scheduler state under this name"]
    scheduler, classes = unwrapped(live), class_names(live)
    settings, saved_settings = (_public(state) for state in (scheduler.state_dict(), saved))
    if origin.classes and not _related(classes, origin.classes):
        if settings != saved_settings or all(map(_of_torch, (classes[0], origin.classes[0]))):
            text = (
                f"{part}: it was saved from another kind of scheduler, {origin.classes[0]}: {classes[0]} cannot go on"
            )
            return [f"{text} from that state"]
    elif not origin.classes and settings - saved_settings and saved_settings - settings:
        lacking, surplus = (
            ", ".join(sorted(names)) for names in (settings - saved_settings, saved_settings - settings)
        )
        return [
            f"{part}: {classes[0]} needs {lacking}, and the checkpoint has {surplus}: it was saved from another kind"
        ]
    inner, states = getattr(scheduler, "_schedulers", []), saved.get("_schedulers", [])
    if len(inner) != len(states):
        return [f"{part}: {len(states)} schedulers in the checkpoint and {len(inner)} in the {_last(classes[0])}"]
    return [
        line
        for number, (child, state) in enumerate(zip(inner, states, strict=True))
        for line in scheduler_differences(f"{part}[{number}]", child, state, NO_ORIGIN)
    ]


def _public(state: Mapping[str, Any]) -> set[str]:
    return {name for name in state if not name.startswith("_") and name != "verbose"}


# --- by name --------------------------------------------------------------------------------------------------------

Names = list[list[str]]  # of parameters, by group


def _in_live_order(
    live: torch.optim.Optimizer, saved: Mapping[str, Any], origin: PartOrigin, names: Mapping[int, str]
) -> tuple[Mapping[str, Any], Names, Names]:
    """Put the groups and parameters of a saved state into the order of the live ones, where names tell it.

    Returns:
        The state, and the names of the live and of the saved parameters; both empty where they are not known.
    """
    groups, given_names = saved["param_groups"], [group.get("param_names") or [] for group in live.param_groups]
    live_names, saved_names = names_by_group(live, names), origin.names
    if all(given_names) and all(group.get("param_names") for group in groups):
        live_names = [list(map(plain_name, group)) for group in given_names]
        saved_names = [list(map(plain_name, group["param_names"])) for group in groups]
    if not live_names or [len(group["params"]) for group in groups] != list(map(len, saved_names)):
        return saved, [], []
    number_of = {frozenset(group): number for number, group in enumerate(saved_names)}
    order = [number_of.get(frozenset(group), -1) for group in live_names]
    index_of = {
        name: index
        for group, group_names in zip(groups, saved_names, strict=True)
        for name, index in zip(group_names, group["params"], strict=True)
    }
    distinct = len(index_of) == sum(map(len, saved_names)) == sum(map(len, live_names))
    in_one_vector = isinstance(unwrapped(live), torch.optim.LBFGS)
    if in_one_vector or not distinct or sorted(order) != list(range(len(groups))):
        return saved, live_names, saved_names
    arranged = [
        {**groups[number], "params": [index_of[name] for name in group_names]}
        for number, group_names in zip(order, live_names, strict=True)
    ]
    for group, group_names in zip(arranged, given_names, strict=True):
        if group_names:
            group["param_names"] = list(group_names)
    return {**saved, "param_groups": arranged}, live_names, live_names


def _misplaced(part: str, live_names: Names, saved_names: Names) -> list[str]:
    """Say when moments would go to another parameter than theirs."""
    targets, sources = (list(itertools.chain.from_iterable(names)) for names in (live_names, saved_names))
    live = frozenset(targets)
    pairs = [pair for pair in zip(sources, targets, strict=False) if pair[0] != pair[1] and pair[0] in live]
    if not pairs:
        return []
    count = f", and {len(pairs) - 1} more would go astray" if len(pairs) > 1 else ""
    text = f"{part}: the moments of {pairs[0][0]!r} would go to {pairs[0][1]!r}{count}: the optimizer holds the "
    return [f"{text}parameters in other groups or in another order than when this was saved"]


# --- loading --------------------------------------------------------------------------------------------------------


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Any, origin: PartOrigin, names: Mapping[int, str], *, on_gpu: bool
) -> str:
    """Load a saved state that fits; returns a phrase that says what was restored.

    Args:
        saved: in memory of its own, unless ``on_gpu``.
        on_gpu: whether parameters are on a GPU.
    """
    if not is_optimizer_state(saved):
        optimizer.load_state_dict(saved)
        return f"{type(optimizer).__name__}, by its load_state_dict"
    inner, saved_groups = unwrapped(optimizer), saved["param_groups"]
    saved, _, _ = _in_live_order(inner, saved, origin, names)
    by_name = [group["params"] for group in saved["param_groups"]] != [group["params"] for group in saved_groups]
    saved = {**saved, "param_groups": _usable_groups(inner, saved)}
    saved = _on_their_devices(saved, inner) if on_gpu else saved
    inherited = type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict
    # torch's own would set attributes of the wrapper, which hide those inside
    (inner if inherited else optimizer).load_state_dict(saved)
    parameters = _parameters_by_index(inner, saved)
    with_moments = {index: moments for index in parameters if (moments := saved["state"].get(index))}
    for index, moments in with_moments.items():
        live = inner.state[parameters[index]]
        for name, value in moments.items():
            # torch casts state to the parameter's dtype on load: float32 moments of bfloat16 weights would be rounded
            if isinstance(value, torch.Tensor) and name in live and live[name].dtype != value.dtype:
                live[name] = value.to(parameters[index].device)
    groups = f"{len(saved_groups)} groups"
    if not with_moments:
        return f"{groups}; the checkpoint has no moments"
    return f"{groups}, moments of {len(with_moments)} of {len(parameters)} parameters{', by name' if by_name else ''}"


def _usable_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the saved groups with what the live ones need besides: settings that are newer than the saved ones.

    ``capturable``, which steps on a GPU only, is that of the script on a CPU.
    """
    groups = zip(saved["param_groups"], _completed(optimizer, saved), optimizer.param_groups, strict=True)
    usable = []
    for group, completed, live in groups:
        from_live = {name for name in optimizer.defaults if name not in completed}
        if all(parameter.is_cpu for parameter in live["params"]):
            from_live.add("capturable")
        usable.append({**group, **{name: live[name] for name in live if name in from_live}})
    return usable


def _on_their_devices(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state whose tensors have memory of their own, on the device of their parameters.

    Steps stay where they are: torch decides on their device.
    """
    parameters = _parameters_by_index(optimizer, saved)
    state: dict[Any, Any] = {}
    pairs = []
    for index, moments in saved["state"].items():
        state[index] = dict(moments) if isinstance(moments, Mapping) else moments
        for name, value in moments.items() if isinstance(moments, Mapping) else ():
            if isinstance(value, torch.Tensor):
                device = parameters[index].device if index in parameters and name != "step" else value.device
                state[index][name] = torch.empty_like(value, device=device)
                pairs.append((state[index][name], value))
    sent = send(pairs)
    for target, value in pairs:
        if id(value) not in sent:
            target.copy_(value)
    return {**saved, "state": state}
