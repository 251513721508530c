"""Modules: whether a saved state dict fits a live one, under which names, and how it gets there."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from peakpoint.format.masks import MASK, ORIGINAL, masks_of
from peakpoint.state.device_copy import send
from peakpoint.state.divided import is_divided
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.origin import plain_name, reparametrized

# --- comparing ------------------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """Return element type and shape of a tensor, the type of anything else."""
    if is_lazy(value):
        return "not initialized yet"
    if isinstance(value, torch.Tensor) and value.is_meta:
        return "on the meta device"
    if isinstance(value, torch.Tensor):
        divided = " divided among ranks" if is_divided(value) else ""
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{divided}"
    return kind_of(value)


def fits(live: Any, saved: Any) -> bool:
    """Return whether both are tensors that are alike, or neither is a tensor."""
    if is_lazy(live):
        return isinstance(saved, torch.Tensor)  # it takes the shape of what is loaded
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        alike = live.shape == saved.shape and live.dtype == saved.dtype and is_divided(live) == is_divided(saved)
        return alike and not live.is_meta
    return not isinstance(live, torch.Tensor) and not isinstance(saved, torch.Tensor)


def _entry_fits(name: Any, live: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Return whether an entry of both state dicts fits. A module's ``set_extra_state`` takes any shape."""
    return str(name).endswith("_extra_state") or fits(live[name], saved[name])


def loading_differences(part: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """List what keeps ``load_module`` from loading all of a saved state dict."""
    saved = under_live_names(live, saved)
    return module_differences(part, _with_masks(live, saved), saved)


def module_differences(part: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """List what keeps a saved state dict from fitting a module: names, shapes and dtypes."""
    tied = _tied(live, saved)
    missing = [name for name in live if name not in saved and name not in tied]
    unknown = [name for name in saved if name not in live]
    different = [name for name in saved if name in live and not _entry_fits(name, live, saved)]
    return [
        *(f"{part}: the checkpoint has no {name!r} ({describe(live[name])})" for name in missing),
        *(f"{part}: the checkpoint has {name!r} ({describe(saved[name])}), the model does not" for name in unknown),
        *(
            f"{part}: {name!r} is {describe(saved[name])} in the checkpoint, {describe(live[name])} in the model"
            for name in different
        ),
    ]


def _tied(live: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, str]:
    """Return names that only a live state dict has to names that both have, where these are the same memory.

    Writers of safetensors files store tied weights under one of their names.
    """
    by_memory = {memory: name for name in saved if name in live and (memory := _memory(live[name])) is not None}
    return {
        name: by_memory[memory] for name in live if name not in saved and (memory := _memory(live[name])) in by_memory
    }


def _memory(value: Any) -> tuple[Any, ...] | None:
    """Return what two tensors have in common that are the same; None where there is no memory to share."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_meta or not value.numel():
        return None
    return value.data_ptr(), value.dtype, value.device, value.shape, value.stride()


def under_live_names(live: Mapping[str, Any], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a saved state dict under the names of a live one, where these differ by ``module.`` and ``_orig_mod.``.

    A name that fits as it is, and one for which there would be a choice, stay as they are.
    """
    own_names, foreign = (
        {name: plain_name(name) for name in names if isinstance(name, str)}
        for names in (live.keys() - saved.keys(), saved.keys() - live.keys())
    )
    if not own_names or not foreign:
        return saved
    uses = Counter(own_names.values()), Counter(foreign.values())
    own_by_plain = {plain: name for name, plain in own_names.items() if uses[0][plain] == 1}
    renamed = {name: _own_name(plain, own_by_plain) for name, plain in foreign.items() if uses[1][plain] == 1}
    result = OrderedDict((renamed.get(name) or name, value) for name, value in saved.items())
    _set_metadata(result, _metadata_under(live, saved))
    return result


def _own_name(plain: str, own_by_plain: Mapping[str, str]) -> str | None:
    """Return the live name of a saved tensor; of an original and a mask, the name that they get beside the weight."""
    for suffix in ("", ORIGINAL, MASK):
        weight = own_by_plain.get(plain.removesuffix(suffix))
        if weight is not None and plain.endswith(suffix):
            return weight + suffix
    return None


def _metadata_under(live: Any, saved: Any) -> Mapping[str, Any] | None:
    """Return the versions of the modules in a saved state dict, under the names of the live modules."""
    metadata = getattr(saved, "_metadata", None)
    if metadata is None:
        return None
    by_plain = {
        plain_name(path): version for path, version in metadata.items()
    }  # of a wrapper and its module, the latter
    paths = getattr(live, "_metadata", None) or {}
    return OrderedDict((path, by_plain[plain_name(path)]) for path in paths if plain_name(path) in by_plain)


def _set_metadata(state: Any, metadata: Mapping[str, Any] | None) -> None:
    if metadata is not None:
        state._metadata = metadata  # noqa: SLF001


# --- masks ----------------------------------------------------------------------------------------------------------


def pruned_weights(live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return the weights that have a mask of ``torch.nn.utils.prune`` in one state dict and none in the other."""
    shapes = {name: tuple(value.shape) for name, value in saved.items() if _has_shape(value)}
    masks = masks_of(shapes)
    return [
        name
        for name, value in live.items()
        if name not in saved and (original := f"{name}{ORIGINAL}") in masks and _has_shape(value)
        if tuple(value.shape) == shapes[original]
    ]


def _has_shape(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not is_lazy(value)


def _with_masks(live: Mapping[str, Any], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a live state dict as it is once the masks of the saved one have been put back."""
    weights = pruned_weights(live, saved)
    masked = {name: value for name, value in live.items() if name not in weights}
    for name in weights:
        masked |= {f"{name}{ORIGINAL}": live[name], f"{name}{MASK}": saved[f"{name}{MASK}"]}
    return masked


def _put_masks_back(module: torch.nn.Module, weights: Sequence[str], saved: Mapping[str, Any]) -> None:
    """Register masks as ``torch.nn.utils.prune`` does; the parameter stays the one that the optimizer has."""
    for name in weights:
        path, _, leaf = name.rpartition(".")
        layer = module.get_submodule(path)
        prune.identity(layer, leaf)  # type: ignore[no-untyped-call]
        mask = torch.empty_like(saved[f"{name}{MASK}"], device=getattr(layer, f"{leaf}{ORIGINAL}").device)
        layer.register_buffer(f"{leaf}{MASK}", mask)


def _apply_masks(module: torch.nn.Module) -> None:
    """Compute the masked weights, as the next forward pass will."""
    for layer in module.modules():
        for hook in layer._forward_pre_hooks.values():  # noqa: SLF001
            if isinstance(hook, prune.BasePruningMethod):
                setattr(layer, hook._tensor_name, hook.apply_mask(layer))  # type: ignore[no-untyped-call] # noqa: SLF001


# --- loading --------------------------------------------------------------------------------------------------------


def load_module(module: torch.nn.Module, saved: Mapping[str, Any], differences: Sequence[str]) -> str:
    """Load what fits of a saved state dict; returns a phrase that says what was restored.

    Args:
        differences: as ``module_differences`` lists them.
    """
    live = module.state_dict()
    by_live_names = under_live_names(live, saved)
    weights = pruned_weights(live, by_live_names)
    if weights:
        _put_masks_back(module, weights, by_live_names)
        live = module.state_dict()
    renamed, saved = by_live_names is not saved and by_live_names.keys() != saved.keys(), by_live_names
    tied = _tied(live, saved)
    if tied:
        metadata = getattr(saved, "_metadata", None)
        saved = OrderedDict({**saved, **{name: saved[other] for name, other in tied.items()}})
        _set_metadata(saved, metadata)
    fitting = {name: value for name, value in saved.items() if name in live and _entry_fits(name, live, saved)}
    sent = send([(live[name], value) for name, value in fitting.items()])
    if sent:  # they are where they belong; load_state_dict gets them from there
        on_gpu = {name: live[name] for name, value in fitting.items() if id(value) in sent}
        fitting |= on_gpu
        metadata = getattr(saved, "_metadata", None)  # the versions of modules
        saved = OrderedDict({**saved, **on_gpu})
        _set_metadata(saved, metadata)
    if differences:
        module.load_state_dict(fitting, strict=False)
    else:
        module.load_state_dict(saved, strict=True)
    _apply_masks(module)
    total, loaded = (sum(isinstance(value, torch.Tensor) for value in values.values()) for values in (live, fitting))
    notes = [f"masks of {len(weights)} weights put back"] if weights else []
    notes += ["saved under the names of a wrapper"] if renamed else []
    notes += [f"{len(tied)} of them tied to others"] if tied else []
    return ", ".join([f"{loaded} of {total} tensors", *notes])


# --- advice ---------------------------------------------------------------------------------------------------------


def advice(modules: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Say what to do when saved state dicts do not fit.

    Args:
        modules: name of the part, live and saved state dict of each that does not.
    """
    unfit = []
    for part, live, saved in modules:
        by_live_names = under_live_names(live, saved)
        live_only = [*pruned_weights(by_live_names, live), *reparametrized(by_live_names, live)]
        saved_only = reparametrized(live, by_live_names)
        if live_only:
            return (
                f"{_listed(live_only)} of {part} had no mask and no parametrization when this was saved: prune or "
                f"parametrize the model after the resume{_NOT_LOADED}"
            )
        if saved_only:
            return (
                f"{_listed(saved_only)} of {part} had been parametrized with torch.nn.utils.parametrize when this was "
                f"saved: register the same parametrization before the resume{_NOT_LOADED}"
            )
        changed = [*_in_another_form(live, by_live_names), *_in_another_form(by_live_names, live)]
        if changed:
            return (
                f"{_listed(changed)} of {part} has another form in the checkpoint than in the model (weight_norm of "
                f"torch.nn.utils and the like): resume with the model in the form of the checkpoint{_NOT_LOADED}"
            )
        if not any(name in live and _entry_fits(name, live, by_live_names) for name in by_live_names):
            unfit.append(part)
    if unfit:
        return f"build the state as it was when this was saved; strict=False would load nothing of {', '.join(unfit)}"
    return "build the state as it was when this was saved, or pass strict=False to load what fits"


def _in_another_form(plain: Mapping[str, Any], changed: Mapping[str, Any]) -> list[str]:
    """Return the weights of which the second state dict has something made of them, such as ``weight_g``."""
    derived = [str(name) for name in changed if name not in plain]
    return [name for name in plain if name not in changed and any(text.startswith(f"{name}_") for text in derived)]


_NOT_LOADED = " (strict=False would leave these weights as they are)"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
