"""The order inside an iteration of the loop: what changes after the report is noticed when the first iteration ends."""

import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch

import peakpoint as pp
from peakpoint.format.events import Removed
from peakpoint.repository import journal
from training import checkpointer, kept, parts, same, train


class Mean:
    """A running mean kept by hand."""

    def __init__(self, model):
        self.mean = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, model):
        for mean, parameter in zip(self.mean, model.parameters(), strict=True):
            mean.lerp_(parameter, 0.5)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


class Training:
    """A model with everything that may move."""

    def __init__(self, root, **options):
        self.root, self.options = root, options
        self.model, self.optimizer = parts()
        self.other = torch.optim.SGD(self.model[2:].parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.mean = Mean(self.model)
        self.counts = {"seen": 0, "array": np.zeros(300)}
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "other": self.other,
            "scheduler": self.scheduler,
            "mean": self.mean,
            "counts": self.counts,
        }

    def checkpointer(self, **options):
        return checkpointer(self.root, state=self.state, **{**self.options, **options})

    def train(self):
        return train(self.model, self.optimizer)

    def everything(self):
        return [part.state_dict() for name, part in self.state.items() if name != "counts"]


def count(training):
    training.counts["seen"] += 1


def count_in_an_array(training):
    training.counts["array"][200] += 1


MOVES = {
    "scheduler": (lambda training: training.scheduler.step(), "state['optimizer'] and state['scheduler']"),
    "mean": (lambda training: training.mean.update(training.model), "state['mean']"),
    "dict": (count, "state['counts']"),
    "array": (count_in_an_array, "state['counts']"),
}


@pytest.fixture(autouse=True)
def no_scheduler_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


def loop(training, kind, total, *moves, before=(), reports=1, leave=lambda _: False, finally_=lambda _: None):
    """Train; ``before`` moves before the report and ``moves`` after it."""
    with training.checkpointer() as ckpt:
        for number in getattr(ckpt, kind)(total):
            for _ in range(reports):
                loss = training.train()
                for move in before:
                    move(training)
                ckpt.report(loss=loss)
            for move in moves:
                move(training)
            if leave(number):
                break
        finally_(training)
    return training


def removals(root):
    return [event for event in journal.read(pp.open(root).store, "r").events if isinstance(event, Removed)]


@pytest.mark.parametrize("kind", ["epochs", "steps"])
@pytest.mark.parametrize("what", MOVES)
def test_what_moves_after_the_report_is_an_error_that_loses_nothing(tmp_path, kind, what):
    move, names = MOVES[what]
    root = tmp_path / "a"
    with pytest.raises(pp.errors.ConfigError, match="one step behind") as caught:
        loop(Training(root), kind, 3, move)
    assert str(caught.value).startswith(f"{names} changed after ckpt.report()")
    (checkpoint,) = kept(root)
    assert checkpoint.name in str(caught.value)
    assert checkpoint.metrics
    assert checkpoint.reasons == ("the newest",)
    (removed,) = removals(root)
    assert removed.by == "loop"
    assert names in removed.reason
    # the line is moved, and the same command run again
    again = loop(Training(root), kind, 3, before=[move])
    whole = loop(Training(tmp_path / "b"), kind, 3, before=[move])
    assert all(map(same, map(plain, again.everything()), map(plain, whole.everything())))
    assert same(again.counts["seen"], whole.counts["seen"])


def plain(tree):
    return {key: plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


@pytest.mark.parametrize("which", ["optimizer", "other"])
def test_a_report_in_the_middle_of_an_epoch_is_an_error_when_it_ends(tmp_path, which):
    def again(training):
        train(training.model, getattr(training, which))

    with pytest.raises(pp.errors.ConfigError, match="would skip what was trained after it") as caught:
        loop(Training(tmp_path), "epochs", 3, again)
    assert str(caught.value).startswith(f"state['{which}'] was stepped")
    (checkpoint,) = kept(tmp_path)
    assert checkpoint.metrics == {}
    assert checkpoint.reasons == ("the training went on after its report",)
    assert checkpoint.step == (2 if which == "optimizer" else 1)
    training = Training(tmp_path)
    with training.checkpointer() as ckpt:
        assert next(ckpt.epochs(3)) == 1


def test_a_second_report_after_more_training_leaves_nothing_wrong(tmp_path):
    with pytest.raises(pp.errors.ConfigError, match="second report in epoch 0"):
        loop(Training(tmp_path), "epochs", 2, reports=2)
    assert kept(tmp_path) == []
    assert "went on" in removals(tmp_path)[0].reason


def test_it_is_noticed_at_once_although_no_rule_saves_it(tmp_path):
    training = Training(tmp_path)
    with training.checkpointer(keep=[pp.Every(epochs=10)]) as ckpt:
        epochs = ckpt.epochs(3)
        next(epochs)
        assert not ckpt.report(loss=training.train()).saved
        training.scheduler.step()
        with pytest.raises(pp.errors.ConfigError, match="Nothing was saved"):
            next(epochs)
    (last,) = kept(tmp_path)
    assert last.reasons == ("the end of the training: the run continues from here",)


def test_it_is_noticed_later_when_it_begins_later(tmp_path):
    def late(training):
        if training.scheduler.last_epoch == 4:
            count(training)

    training = Training(tmp_path, keep=[pp.Every(epochs=2)])
    with pytest.raises(pp.errors.ConfigError, match=r"state\['counts'\]"):
        loop(training, "epochs", 9, late, before=[lambda training: training.scheduler.step()])
    assert [checkpoint.epoch for checkpoint in kept(tmp_path)] == [1, 3]
    assert pp.load("r@latest", root=tmp_path)["counts"]["seen"] == 1


def batches(training, after, *, within=lambda _: None, break_at=None):
    data = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2, shuffle=True)
    with training.checkpointer() as ckpt:
        for _ in ckpt.epochs(2):
            for number, _ in enumerate(ckpt.batches(data)):
                ckpt.report(loss=training.train())
                within(training)
                if number == break_at:
                    break
            after(training)


def test_between_epochs_everything_may_move_when_reports_are_made_inside(tmp_path):
    def after(training):
        training.scheduler.step()
        training.mean.update(training.model)
        training.train()

    batches(Training(tmp_path), after)
    with pytest.raises(pp.errors.ConfigError, match=r"state\['counts'\] changed"):
        batches(Training(tmp_path / "b"), after, within=count)
    newest = kept(tmp_path / "b")[-1]
    assert newest.step == 1
    training = Training(tmp_path / "b")
    with training.checkpointer() as ckpt:
        ckpt.resume()
        assert training.counts["seen"] == 1
        assert ckpt._loop.position.batches.done == 1


def test_after_a_break_it_is_said_when_the_run_is_closed(tmp_path):
    training = Training(tmp_path)
    ckpt = training.checkpointer()
    for _ in ckpt.epochs(3):
        ckpt.report(loss=training.train())
        training.scheduler.step()
        break
    with pytest.raises(pp.errors.ConfigError, match=r"one step behind.*Nothing is lost"):
        ckpt.close()
    ckpt.close()
    assert pp.open(tmp_path).run("r").holder() is None
    assert pp.load("r@latest", root=tmp_path)["scheduler"]["last_epoch"] == 1


@pytest.mark.parametrize("error", [ValueError("a slip"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_that_leaves_the_loop_leaves_no_wrong_checkpoint(tmp_path, error):
    training = Training(tmp_path)

    def fail(_):
        raise error

    with pytest.raises(type(error)):
        loop(training, "epochs", 3, lambda training: training.scheduler.step(), fail)
    assert "one step behind" in "".join(error.__notes__)
    assert pp.load("r@latest", root=tmp_path)["scheduler"]["last_epoch"] == 1
    assert len(kept(tmp_path)) == 1
    assert pp.open(tmp_path).run("r").holder() is None


def test_after_a_break_a_state_that_is_no_longer_that_of_the_turn_is_not_saved(tmp_path):
    def forget(training):
        training.model[0].weight.data.zero_()

    moves = [lambda training: training.scheduler.step()]
    with pytest.raises(pp.errors.ConfigError, match=r"stay as they were at the report \(report 1 at step 1\)"):
        loop(Training(tmp_path), "epochs", 3, *moves, leave=lambda _: True, finally_=forget)
    (checkpoint,) = kept(tmp_path)
    assert pp.load(checkpoint.ref, root=tmp_path)["model"]["0.weight"].any()


def test_a_break_after_the_report_and_an_error_after_it_are_fine(tmp_path):
    def fail(training):
        training.scheduler.step()
        raise ZeroDivisionError

    training = Training(tmp_path)
    loop(training, "epochs", 3, leave=lambda _: True, finally_=lambda training: training.scheduler.step())
    with pytest.raises(ZeroDivisionError):
        loop(training, "epochs", 3, fail)
    assert [checkpoint.epoch for checkpoint in kept(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("draw", "name"),
    [(random.random, "Python's"), (np.random.rand, "NumPy's"), (lambda: torch.rand(1), "torch's")],
)
def test_numbers_drawn_after_the_report_are_warned_of_once(tmp_path, draw, name):
    training = Training(tmp_path)
    with pytest.warns(pp.PeakpointWarning, match=f"^{name} random numbers were drawn after") as seen:
        loop(training, "epochs", 3, lambda _: draw())
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_a_generator_of_the_state_that_moves_is_warned_of(tmp_path):
    training = Training(tmp_path)
    training.state["generator"] = generator = torch.Generator()
    with pytest.warns(pp.PeakpointWarning, match=r'^state\["generator"\] random numbers'):
        loop(training, "epochs", 2, lambda _: torch.rand(1, generator=generator))


@pytest.mark.parametrize("overlap", [True, False])
def test_weights_that_change_after_the_report_are_warned_of_once(tmp_path, overlap):
    training = Training(tmp_path, overlap=overlap)
    averaged = torch.optim.swa_utils.AveragedModel(training.model)
    training.state["averaged"] = averaged
    with pytest.warns(pp.PeakpointWarning, match=r"^state\['averaged'\] changed after") as seen:
        loop(training, "epochs", 3, lambda training: averaged.update_parameters(training.model))
    assert len(seen) == 1


class Unsteady:
    """Says something else whenever it is asked."""

    def __init__(self):
        self.asked = 0

    def state_dict(self):
        self.asked += 1
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


class Sampler(Unsteady):
    """Has a place of its own, which runs ahead."""

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("kind", [Unsteady, Sampler])
def test_what_cannot_be_compared_is_not(tmp_path, kind):
    training = Training(tmp_path)
    training.state["odd"] = kind()
    loop(training, "steps", 3)


def test_a_signal_in_the_first_turn_saves_and_leaves(tmp_path):
    training = Training(tmp_path)
    with pytest.raises(SystemExit):
        loop(
            Training(tmp_path, preempt=pp.Preempt(signals=(signal.SIGUSR1,))),
            "epochs",
            3,
            lambda training: training.scheduler.step(),
            before=[lambda _: os.kill(os.getpid(), signal.SIGUSR1)],
        )
    assert [checkpoint.epoch for checkpoint in kept(tmp_path)] == [0]
    loop(training, "epochs", 2)


class Ahead:
    """A loader that has a place of its own, and reads further than the loop is."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        return iter(())

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_a_loader_may_run_ahead_after_the_report(tmp_path):
    loader = Ahead()
    with checkpointer(tmp_path, state={"loader": loader}) as ckpt:
        for _ in ckpt.epochs(3):
            ckpt.report(acc=0.5)
            loader.place += 1
    assert [one.epoch for one in kept(tmp_path)] == [0, 1, 2]
