"""Import: which entries of a dict become which parts."""

import pytest
import torch

import peakpoint as pp
from foreign_files import Net, objects
from peakpoint.exchange.part_names import find_parts
from peakpoint.exchange.state_dicts import ReadOptions, from_dict
from training import same

WEIGHTS = {"w": torch.ones(2)}
OPTIMIZER = {"state": {}, "param_groups": []}
SCALER = torch.amp.GradScaler("cpu").state_dict()


def names(content, **user_names):
    return find_parts(content, user_names)[1]


@pytest.mark.parametrize(
    ("part", "value", "keys"),
    [
        ("model", WEIGHTS, ["network_weights", "module", "model_dict", "State_dict", "MODEL", "backbone", "G"]),
        ("optimizer", OPTIMIZER, ["optimizer", "opt", "last_optimizer_state", "Optimizer_State_Dict"]),
        ("scaler", SCALER, ["scaler", "grad_scaler", "amp", "native_amp", "GradScaler", "MixedPrecision"]),
        (
            "ema",
            WEIGHTS,
            ["model_ema", "ema_state_dict", "state_dict_ema", "swa_state_dict", "averaged_model", "swa_model", "EMA"],
        ),
        ("ema", {"decay": 0.9, "shadow_params": [torch.ones(2)]}, ["ema"]),
        ("scheduler", {"last_epoch": 1}, ["lr_scheduler", "scheduler_state"]),
    ],
)
def test_usual_names(part, value, keys):
    for key in keys:
        others = {} if part == "model" else {"model": WEIGHTS}
        assert names({"epoch": 3, **others, key: value})[key] == part


def test_the_usual_name_comes_before_another():
    assert names({"head": WEIGHTS, "model": WEIGHTS}) == {"model": "model", "head": "head"}
    assert names({"net": WEIGHTS, "state_dict": WEIGHTS}) == {"state_dict": "model", "net": "net"}
    assert names({"ema": WEIGHTS, "head": WEIGHTS}) == {"ema": "ema", "head": "model"}


def test_numbers_are_no_model():
    assert names({"model": WEIGHTS, "losses": {"a": torch.tensor(1.0)}})["model"] == "model"
    assert "model" not in names({"losses": {"a": torch.tensor(1.0)}}).values()


def test_what_modules_add_to_their_state_is_no_reason_to_doubt():
    state = {"w": torch.ones(2), "_extra_state": {"a": 1}, "layer._extra_state": b"x"}
    assert names({"weird": state}) == {"weird": "model"}
    assert same(find_parts({"weird": state}, {})[0]["model"], state)


def test_two_of_a_kind_have_their_own_names_and_the_report_says_how_to_choose(tmp_path):
    torch.save({"gen": Net().state_dict(), "disc": Net().state_dict()}, tmp_path / "a.pth")
    [source] = pp.import_checkpoints(tmp_path / "a.pth", tmp_path / "root", run="r").checkpoints
    assert source.parts == ("gen", "disc")
    assert "no part is the model: --part NAME=model makes one of gen, disc it" in source.notes


def test_a_part_keeps_its_name_when_a_user_gives_it_to_another():
    parts, part_of, _ = find_parts({"gen": {"w": torch.ones(1)}, "model": WEIGHTS}, {"gen": "model"})
    assert part_of == {"gen": "model", "model": "my_model"}
    assert parts["model"]["w"].numel() == 1


def test_state_dicts_deeper_in_a_dict_are_found(tmp_path):
    model, optimizer, _ = objects()
    state = {"model": model.state_dict(), "optimizers": {"AdamW": optimizer.state_dict()}, "run_name": "x"}
    torch.save({"state": state, "epoch": 2}, tmp_path / "a.pth")
    [source] = pp.import_checkpoints(tmp_path / "a.pth", tmp_path / "root", run="r").checkpoints
    assert {"state.model -> model", "state.optimizers.AdamW -> optimizer"} <= set(source.notes)
    into = Net()
    pp.load("r@latest", root=tmp_path / "root", into=into)
    assert same(dict(into.state_dict()), dict(model.state_dict()))
    assert pp.load("r@latest", root=tmp_path / "root")["extra"] == {"state": {"run_name": "x"}, "epoch": 2}
    with pytest.raises(pp.errors.FormatError, match=r"is not a state dict of tensors; .* --part state\.model=model"):
        pp.import_checkpoints(tmp_path / "a.pth", tmp_path / "root", run="s", parts={"state": "model"})


def test_several_deeper_state_dicts_have_dotted_names():
    content = {"model": {"encoder": WEIGHTS, "decoder": WEIGHTS}, "epoch": 1}
    assert names(content) == {"model.encoder": "model.encoder", "model.decoder": "model.decoder"}
    assert names(content, **{"model.encoder": "model"})["model.encoder"] == "model"
    both = {"G": {"model": WEIGHTS}, "D": {"model": WEIGHTS}}
    assert names(both) == {"G.model": "G.model", "D.model": "D.model"}
    assert names({"a.b": WEIGHTS, "c": WEIGHTS}, **{"a.b": "model"})["a.b"] == "model"


def test_what_a_user_puts_away_is_not_searched():
    content = {"state": {"model": WEIGHTS}, "old": {"model": WEIGHTS}}
    assert names(content, old="extra") == {"state.model": "model"}


@pytest.mark.parametrize("name", ["stat", "state.modle", "state.model.w.x"])
def test_names_that_are_not_there_are_refused(name):
    with pytest.raises(pp.errors.FormatError, match="the file has no"):
        names({"state": {"model": WEIGHTS}}, **{name: "model"})


def test_only_what_fits_is_the_optimizer():
    with pytest.raises(pp.errors.FormatError, match="is not the state of an optimizer; deeper in it are o"):
        names({"model": WEIGHTS, "o": {"Adam": OPTIMIZER}}, o="optimizer")


def test_of_lightning_s_averaged_weights_the_trained_ones_are_the_model(tmp_path):
    trained, averaged = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    content = {
        "pytorch-lightning_version": "2.6.0",
        "epoch": 1,
        "state_dict": averaged,
        "current_model_state": trained,
        "averaging_state": {"n_averaged": torch.tensor(3)},
        "MixedPrecision": SCALER,
    }
    checkpoint = from_dict(content, tmp_path, ReadOptions())
    assert same(checkpoint.parts["model"], trained)
    assert same(checkpoint.parts["ema"], averaged)
    assert set(checkpoint.parts) == {"model", "ema", "averaging_state", "scaler"}
    other = ReadOptions(parts={"state_dict": "model", "current_model_state": "trained"})
    assert same(from_dict(content, tmp_path, other).parts["model"], averaged)
    with pytest.raises(pp.errors.FormatError, match="two names become the part model: current_model_state, state_dict"):
        from_dict(content, tmp_path, ReadOptions(parts={"state_dict": "model"}))


@pytest.mark.parametrize(
    "value",
    [
        {"w": torch.ones(1)},
        {"state": 3, "param_groups": []},
        {"state": {0: {"step": 1}, "0": {"step": 2}}, "param_groups": []},
    ],
    ids=["weights", "no state", "one number twice"],
)
def test_what_is_called_optimizer_and_is_none_stays_as_it_is(value):
    parts, _, _ = find_parts({"model": {"w": torch.ones(1)}, "optimizer": value}, {})
    assert parts["optimizer"] is value
