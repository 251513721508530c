"""What is restored rules, and the resume says which settings of the script it has overruled, and no others."""

import pytest
import torch
from torch.optim import lr_scheduler as sched

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer


class Script:
    """A training script with these settings."""

    def __init__(self, make_optimizer, make_scheduler=None, *, by_hand=False):
        self.model = torch.nn.Linear(3, 3)
        self.optimizer = make_optimizer(self.model)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        if make_scheduler is not None:
            self.state["scheduler"] = make_scheduler(self.optimizer)
        self.by_hand = by_hand

    def run(self, root, epochs):
        """Train; returns what the resume says to be overruled, and what is printed."""
        texts = []
        with checkpointer(root, state=self.state, announce=texts.append) as ckpt:
            for _ in ckpt.epochs(epochs):
                self.model(torch.ones(2, 3)).square().sum().backward()
                self.optimizer.step()
                if isinstance(scheduler := self.state.get("scheduler"), sched.ReduceLROnPlateau):
                    scheduler.step(1.0)
                elif scheduler is not None:
                    scheduler.step()
                if self.by_hand:
                    self.optimizer.param_groups[0]["lr"] *= 0.5
                ckpt.report(loss=1.0)
            report = ckpt.resume()
        return () if report is None else report.overruled, "\n".join(texts)


def adamw(lr=0.1, **settings):
    return lambda model: torch.optim.AdamW(model.parameters(), lr, **settings)


def sgd(lr=0.1, **settings):
    return lambda model: torch.optim.SGD(model.parameters(), lr, **settings)


def groups(first, second):
    return lambda model: torch.optim.AdamW(
        [{"params": [model.weight], "lr": first}, {"params": [model.bias], "lr": second}]
    )


def sequence(total):
    return lambda o: sched.SequentialLR(
        o, [sched.LinearLR(o, total_iters=2), sched.CosineAnnealingLR(o, total)], milestones=[2]
    )


CHANGED = {
    "lr": (adamw(), adamw(0.5), None, None, ("optimizer: lr 0.1, not 0.5",)),
    "several": (
        adamw(weight_decay=0.01),
        adamw(0.5, weight_decay=0.2, betas=(0.8, 0.9)),
        None,
        None,
        ("optimizer: lr 0.1, not 0.5; betas [0.9, 0.999], not [0.8, 0.9]; weight_decay 0.01, not 0.2",),
    ),
    "one group": (groups(0.1, 0.2), groups(0.1, 0.3), None, None, ("optimizer: lr 0.2, not 0.3",)),
    "momentum": (sgd(momentum=0.9), sgd(momentum=0.5), None, None, ("optimizer: momentum 0.9, not 0.5",)),
    "horizon": (
        adamw(),
        adamw(0.5),
        lambda o: sched.CosineAnnealingLR(o, 10),
        lambda o: sched.CosineAnnealingLR(o, 100),
        ("optimizer: lr 0.1, not 0.5", "scheduler: T_max 10, not 100"),
    ),
    "total steps": (
        adamw(),
        adamw(),
        lambda o: sched.OneCycleLR(o, 1.0, total_steps=10),
        lambda o: sched.OneCycleLR(o, 1.0, total_steps=20),
        ("scheduler: total_steps 10, not 20",),
    ),
    "milestones": (
        adamw(),
        adamw(),
        lambda o: sched.MultiStepLR(o, [2, 4], gamma=0.1),
        lambda o: sched.MultiStepLR(o, [2, 4], gamma=0.5),
        ("scheduler: gamma 0.1, not 0.5",),
    ),
    "inside a sequence": (adamw(), adamw(), sequence(10), sequence(20), ("scheduler: T_max 10, not 20",)),
    "amsgrad": (adamw(), adamw(amsgrad=True), None, None, ("optimizer: amsgrad False, not True",)),
}


@pytest.mark.parametrize(
    ("first", "second", "first_schedule", "second_schedule", "lines"), CHANGED.values(), ids=CHANGED
)
def test_changed_settings_are_told_with_both_values_at_every_resume(
    first, second, first_schedule, second_schedule, lines
):
    root = MemoryStore()
    assert Script(first, first_schedule).run(root, 3)[0] == ()
    for epochs in (4, 5):
        overruled, printed = Script(second, second_schedule).run(root, epochs)
        assert overruled == lines
        assert all(f"settings as saved, not as in the script: {line}" in printed for line in lines)


SCHEDULES = {
    "by hand": None,
    "step": lambda o: sched.StepLR(o, 1),
    "exponential": lambda o: sched.ExponentialLR(o, 0.5),
    "warm restarts": lambda o: sched.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "one cycle": lambda o: sched.OneCycleLR(o, 1.0, total_steps=10),
    "cyclic": lambda o: sched.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "plateau": lambda o: sched.ReduceLROnPlateau(o, patience=0),
    "lambda": lambda o: sched.LambdaLR(o, lambda epoch: 0.5**epoch),
    "sequence": sequence(10),
    "milestones": lambda o: sched.MultiStepLR(o, [1, 3]),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_what_training_has_moved_is_no_difference(schedule):
    root = MemoryStore()
    for epochs in (2, 4, 5):
        overruled, printed = Script(sgd(momentum=0.9), schedule, by_hand=schedule is None).run(root, epochs)
        assert overruled == ()
        assert "script" not in printed


def test_a_setting_that_was_taken_over_by_hand_is_no_difference():
    root = MemoryStore()
    Script(adamw()).run(root, 2)
    second = Script(adamw(0.5))
    with checkpointer(root, state=second.state) as ckpt:
        assert ckpt.resume().overruled == ("optimizer: lr 0.1, not 0.5",)
        second.optimizer.param_groups[0]["lr"] = 0.5
        ckpt.report(loss=1.0)
    assert Script(adamw(0.5)).run(root, 5)[0] == ()


def test_a_load_by_ref_does_not_speak_of_a_script():
    root = MemoryStore()
    Script(adamw()).run(root, 2)
    assert pp.load("r@latest", root=root, into=Script(adamw(0.5)).state).overruled == ()


@pytest.mark.usefixtures("processes_have_torch")
def test_a_checkpoint_without_a_note_is_compared_by_the_first_learning_rate(tmp_path):
    """Of what another tool has saved, it is known where a scheduler had begun."""
    first = Script(adamw(), lambda o: sched.StepLR(o, 1))
    first.run(MemoryStore(), 3)
    torch.save({name: part.state_dict() for name, part in first.state.items()}, tmp_path / "c.pt")
    pp.import_checkpoints(tmp_path / "c.pt", tmp_path / "runs", run="r")
    for lr, lines in ((0.1, ()), (0.5, ("optimizer: lr 0.1, not 0.5",))):
        script = Script(adamw(lr), lambda o: sched.StepLR(o, 1))
        with (
            pytest.warns(pp.PeakpointWarning),
            checkpointer(tmp_path / "runs", state=script.state, resume="r@latest", run=f"of{lr}") as ckpt,
        ):
            assert ckpt.resume().overruled == lines
