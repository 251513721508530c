"""State dicts that fit but for wrappers' names and masks are loaded; for the rest one sentence says what to do."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer, same


def net(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 1)))


def compiled(model):
    return torch.compile(model, backend="eager")


def inside(model):
    model[2] = compiled(model[2])
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(compiled(model)),
    "both, other way": lambda model: compiled(nn.DataParallel(model)),
    "inside": inside,
    "inside and outside": lambda model: compiled(inside(model)),
}


def plain(model):
    """The tensors of a wrapped model, in the order and with the names of the plain one."""
    return dict(zip(net().state_dict(), model.state_dict().values(), strict=True))


def step(state):
    state["optimizer"].zero_grad()
    state["model"](torch.ones(4, 3)).square().mean().backward()
    state["optimizer"].step()


def make(wrap, seed=1, *, named=False, backwards=False):
    model = wrap(net(seed))
    parameters = list(model.named_parameters() if named else model.parameters())
    optimizer = torch.optim.Adam(reversed(parameters) if backwards else parameters)
    return {"model": model, "optimizer": optimizer}


def save(state, steps=1):
    root = MemoryStore()
    with checkpointer(root, state=state) as ckpt:
        for _ in range(steps):
            step(state)
        ckpt.report(step=1, loss=1.0)
    return root


def resume(root, state, **options):
    with checkpointer(root, state=state, resume="must", **options) as ckpt:
        return ckpt.resume()


# --- wrappers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", WRAPPERS)
@pytest.mark.parametrize("first", WRAPPERS)
def test_a_state_is_loaded_in_spite_of_wrappers(first, second):
    saved = WRAPPERS[first](net())
    root = MemoryStore()
    with checkpointer(root, state={"model": saved}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    live = WRAPPERS[second](net(2))
    what = pp.load("r@latest", root=root, into=live).restored[0].what
    assert same(plain(live), plain(saved))
    assert ("names of a wrapper" in what) == (saved.state_dict().keys() != live.state_dict().keys())


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("first", "second"), [("compiled", "plain"), ("plain", "both"), ("parallel", "inside")])
def test_moments_go_by_name_in_spite_of_wrappers(first, second, named):
    saved = make(WRAPPERS[first], named=named)
    root = save(saved)
    live = make(WRAPPERS[second], 2, named=named, backwards=True)
    resume(root, live)
    for parameter, own in zip(saved["model"].parameters(), live["model"].parameters(), strict=True):
        assert same(saved["optimizer"].state[parameter], live["optimizer"].state[own])
    if named:
        names = [name for name, _ in live["model"].named_parameters()]
        assert live["optimizer"].param_groups[0]["param_names"] == names[::-1]


def test_versions_of_modules_come_along():
    """A BatchNorm of the first version has no counter of batches; the saved one says that it has."""
    root = save(make(compiled))
    live = make(WRAPPERS["plain"], 2)["model"]
    versions = []
    live[1].register_load_state_dict_pre_hook(lambda *arguments: versions.append(arguments[3]["version"]))
    pp.load("r@latest", root=root, into=live)
    assert versions == [2]


class Own(nn.Module):
    """A module that has itself called a layer like a wrapper does."""

    def __init__(self, *, twice):
        super().__init__()
        self.module = nn.Linear(2, 2)
        if twice:
            self._orig_mod = nn.Linear(2, 2)


def test_what_could_be_two_tensors_is_left_alone():
    root = MemoryStore()
    with checkpointer(root, state={"model": nn.Linear(2, 2)}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    pp.load("r@latest", root=root, into=Own(twice=False))
    live = Own(twice=True)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    with pytest.raises(pp.errors.MismatchError, match=r"no 'module\.weight'"):
        pp.load("r@latest", root=root, into=live)
    assert same(dict(live.state_dict()), before)


def test_what_else_differs_is_listed_alone():
    root = MemoryStore()
    average = AveragedModel(net())
    with checkpointer(root, state={"model": average}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    live = net(2)
    with pytest.raises(pp.errors.MismatchError) as caught:
        pp.load("r@latest", root=root, into=live)
    assert caught.value.differences == ("model: the checkpoint has 'n_averaged' (int64[]), the model does not",)
    pp.load("r@latest", root=root, into=live, strict=False)
    assert same(dict(live.state_dict()), dict(average.module.state_dict()))


def test_strict_false_is_not_advised_where_it_would_load_nothing():
    root = MemoryStore()
    with checkpointer(root, state={"model": nn.Linear(2, 2)}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    with pytest.raises(pp.errors.MismatchError, match=r"strict=False would load nothing of model$"):
        pp.load("r@latest", root=root, into=nn.Linear(5, 5))


# --- masks ----------------------------------------------------------------------------------------------------------


def prune_half(model):
    plain_model = getattr(model, "module", model)
    layers = [(plain_model[0], "weight"), (plain_model[0], "bias"), (plain_model[2][0], "weight")]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)


@pytest.mark.parametrize("wrap", [WRAPPERS["plain"], nn.DataParallel], ids=["plain", "parallel"])
def test_a_run_that_was_pruned_on_the_way_is_continued_bit_by_bit(wrap):
    saved = make(wrap)
    step(saved)
    prune_half(saved["model"])
    root = save(saved)
    live = make(wrap, 2)
    own = live["optimizer"].param_groups[0]["params"]
    report = resume(root, live)
    assert "masks of 3 weights put back" in str(report)
    assert {id(parameter) for parameter in live["model"].parameters()} == set(map(id, own))
    layer = getattr(live["model"], "module", live["model"])[0]
    assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    for state in (saved, live):
        step(state)
        prune_half(state["model"])  # goes on from the masks that are there
        step(state)
    assert same(dict(live["model"].state_dict()), dict(saved["model"].state_dict()))
    assert same(live["optimizer"].state_dict(), saved["optimizer"].state_dict())
    assert sum(int((value == 0).sum()) for name, value in live["model"].named_buffers() if "mask" in name) > 10


@pytest.mark.parametrize("masks", [prune_half, lambda model: prune.identity(model[0], "weight")])
def test_masks_that_are_there_already(masks):
    saved, live = make(WRAPPERS["plain"]), make(WRAPPERS["plain"], 2)
    prune_half(saved["model"])
    masks(live["model"])
    resume(save(saved), live)
    assert same(dict(live["model"].state_dict()), dict(saved["model"].state_dict()))


def test_a_refusal_takes_the_masks_away_again():
    class Refusing:
        def state_dict(self):
            return {"a": 1}

        def load_state_dict(self, state):
            raise ValueError("not mine")

    saved, live = make(WRAPPERS["plain"]), make(WRAPPERS["plain"], 2)
    prune_half(saved["model"])
    root = save({**saved, "last": Refusing()})
    before = {name: value.clone() for name, value in live["model"].state_dict().items()}
    with pytest.raises(pp.errors.MismatchError, match="not mine"):
        resume(root, {**live, "last": Refusing()})
    assert same(dict(live["model"].state_dict()), before)
    assert isinstance(live["model"][0].weight, nn.Parameter)
    assert not live["model"][0]._forward_pre_hooks
    step(live)


def test_masks_of_other_shapes_keep_nothing_else_from_being_loaded():
    saved, live = net(), net(2)
    prune.l1_unstructured(saved[0], "weight", 0.5)
    prune.l1_unstructured(saved[2][0], "weight", 0.5)
    live[0] = nn.Linear(5, 4)
    root = MemoryStore()
    with checkpointer(root, state={"model": saved}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    report = pp.load("r@latest", root=root, into=live, strict=False)
    assert report.restored[0].what == "9 of 10 tensors, masks of 1 weights put back"
    assert isinstance(live[0].weight, nn.Parameter)
    assert torch.equal(live[2][0].weight, saved[2][0].weight)


def refused(saved, live):
    root = MemoryStore()
    with checkpointer(root, state={"model": saved}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    with pytest.raises(pp.errors.MismatchError) as caught:
        pp.load("r@latest", root=root, into=live)
    return str(caught.value).rpartition("\n")[2]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
        lambda model: parametrizations.weight_norm(model[0]),
        lambda model: parametrizations.orthogonal(model[0]),
    ],
    ids=["mask", "weight norm", "orthogonal"],
)
def test_a_model_that_was_changed_too_early_is_told_so(change):
    live = net(2)
    change(live)
    assert refused(net(), live) == (
        "0.weight of model had no mask and no parametrization when this was saved: prune or parametrize the model "
        "after the resume (strict=False would leave these weights as they are)"
    )


@pytest.mark.parametrize("register", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_parametrization_has_to_be_registered_before(register):
    saved, live = net(), net(2)
    register(saved[0])
    assert refused(saved, live) == (
        "0.weight of model had been parametrized with torch.nn.utils.parametrize when this was saved: register the "
        "same parametrization before the resume (strict=False would leave these weights as they are)"
    )
    assert refused(nn.DataParallel(saved), net(2)).startswith("0.weight of model had been parametrized")
    register(live[0])
    root = MemoryStore()
    with checkpointer(root, state={"model": saved}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    pp.load("r@latest", root=root, into=live)
    assert torch.equal(live[0].weight, saved[0].weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("register", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_the_old_forms_of_weights_are_named_too(register, early):
    saved, live = net(), net(2)
    register((live if early else saved)[0])
    assert refused(saved, live).startswith("0.weight of model has another form in the checkpoint")


# --- tensors that take no values --------------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_is_refused():
    """torch would load nothing into it, without a word."""
    root = MemoryStore()
    with checkpointer(root, state={"model": net()}) as ckpt:
        ckpt.report(step=1, loss=1.0)
    live = net().to("meta")
    with pytest.raises(pp.errors.MismatchError, match=r"'0\.weight' is float32\[4, 3\] in the checkpoint, on the meta"):
        pp.load("r@latest", root=root, into=live)
