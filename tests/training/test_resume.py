"""Stopped and resumed is the same as never stopped, to the bit; and where a run continues from."""

import random
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import peakpoint as pp
from training import checkpointer, kept, parts, same, train

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata with a new torch


class Killed(Exception):
    """Stands for the end of a process."""


def by_epochs(ckpt, model, optimizer, seen):
    for epoch in ckpt.epochs(6):
        yield ckpt.report(loss=train(model, optimizer)), epoch


def by_steps(ckpt, model, optimizer, seen):
    for step in ckpt.steps(8):
        loss = train(model, optimizer)
        if step % 2:
            yield ckpt.report(loss=loss), step


def by_hand(ckpt, model, optimizer, seen):
    loaded = ckpt.resume()
    for step in range(0 if loaded is None else loaded.step, 6):
        yield ckpt.report(loss=train(model, optimizer)), step


def by_batches(ckpt, model, optimizer, seen):
    data = TensorDataset(torch.arange(21.0).reshape(7, 3) / 21)
    loader = ckpt.state.get("loader") or DataLoader(data, batch_size=2, shuffle=True, generator=ckpt.state.get("own"))
    for epoch in ckpt.epochs(3):
        for number, (batch,) in enumerate(ckpt.batches(loader)):
            seen.append(batch)
            loss = train(model, optimizer, batch + torch.randn(1))
            if number % 2:
                yield ckpt.report(inner=loss), epoch
        yield ckpt.report(done=1.0), epoch


def by_own_generator(ckpt, model, optimizer, seen):
    yield from by_batches(ckpt, model, optimizer, seen)


def by_stateful_loader(ckpt, model, optimizer, seen):
    yield from by_batches(ckpt, model, optimizer, seen)


LOOPS = [by_epochs, by_steps, by_hand, by_batches, by_own_generator, by_stateful_loader]


def train_until(root, loop, stop=None, seed=0, **options):
    """Train; ``stop``: die after so many reports. Returns all that must be the same in the end."""
    model, optimizer = parts(seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    count = {"steps": 0}

    def stepped(*_):  # a schedule and a counter that move with every step
        count["steps"] += 1
        scheduler.last_epoch += 1

    optimizer.register_step_post_hook(stepped)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "count": count}
    if loop is by_own_generator:
        state["own"] = torch.Generator().manual_seed(seed + 5)
    if loop is by_stateful_loader:
        data = TensorDataset(torch.arange(21.0).reshape(7, 3) / 21)
        state["loader"] = StatefulDataLoader(data, batch_size=2, shuffle=True)
    seen, reports = [], 0
    try:
        with checkpointer(root, state=state, **options) as ckpt:
            for reports, _ in enumerate(loop(ckpt, model, optimizer, seen), 1):
                if reports == stop:
                    raise Killed  # noqa: TRY301
    except Killed:
        pass
    final = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random.random()}
    return {**final, "torch": torch.rand(2), "scheduler": scheduler.state_dict(), "count": count}, seen, reports


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_stopped_and_resumed_is_the_same_as_never_stopped(tmp_path, loop, stop):
    expected, seen, total = train_until(tmp_path / "a", loop)
    _, before, _ = train_until(tmp_path / "b", loop, stop)
    actual, after, rest = train_until(tmp_path / "b", loop, seed=99)
    assert same(seen, before + after)
    assert stop + rest == total
    assert [(c.step, c.epoch, dict(c.metrics)) for c in kept(tmp_path / "a")] == [
        (c.step, c.epoch, dict(c.metrics)) for c in kept(tmp_path / "b")
    ]
    assert same(expected, actual)


def simple(root, total, *, width=4, **options):
    model, optimizer = parts(width=width)
    said = []
    state = {"model": model, "optimizer": optimizer}
    with checkpointer(root, state=state, announce=said.append, **options) as ckpt:
        epochs = []
        for epoch in ckpt.epochs(total):
            ckpt.report(loss=train(model, optimizer))
            epochs.append(epoch)
    return epochs, said


class Noisy(TensorDataset):
    """Draws random numbers in its workers."""

    def __getitem__(self, index):
        return self.tensors[0][index] + torch.rand(())


@pytest.mark.parametrize(("restores_itself", "warned"), [(True, 1), (False, 0)])
def test_a_resume_inside_an_epoch_is_exact_or_warns_of_the_generators_of_workers(tmp_path, restores_itself, warned):
    def batches(root, stop):
        torch.manual_seed(0)
        loader = (StatefulDataLoader if restores_itself else DataLoader)(
            Noisy(torch.zeros(8)), batch_size=2, shuffle=True, num_workers=1
        )
        state = {"x": 1, **({"loader": loader} if restores_itself else {})}
        with checkpointer(root, state=state) as ckpt:
            for _ in ckpt.epochs(1):
                for number, batch in enumerate(ckpt.batches(loader), 1):
                    seen.append(batch)
                    ckpt.report()
                    if number == stop:
                        return

    seen = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        batches(tmp_path / "whole", stop=0)
        whole, seen = seen, []
        batches(tmp_path / "cut", stop=2)
        batches(tmp_path / "cut", stop=0)
    assert sum("worker processes" in str(one.message) for one in said) == warned
    assert same(whole, seen) is not bool(warned)


def test_auto_continues_if_there_is_something(tmp_path):
    assert simple(tmp_path, 2) == ([0, 1], ["new run 'r' (no checkpoints yet)"])
    epochs, said = simple(tmp_path, 4)
    assert epochs == [2, 3]
    assert said[0].startswith("resumed from r/")
    assert simple(tmp_path, 4)[0] == []


def test_must_insists(tmp_path):
    with pytest.raises(pp.errors.NotFoundError, match="has no checkpoint"):
        simple(tmp_path, 2, resume="must")
    simple(tmp_path, 2)
    assert simple(tmp_path, 3, resume="must")[0] == [2]


def test_never_starts_again_and_keeps_what_is_there(tmp_path):
    simple(tmp_path, 2)
    assert simple(tmp_path, 2, resume="never")[0] == [0, 1]
    assert len(kept(tmp_path)) == 4
    assert len(pp.open(tmp_path).run("r").history()) == 2


def test_a_ref_starts_there_once(tmp_path):
    simple(tmp_path, 4)
    assert simple(tmp_path, 4, resume="r:epoch=1")[0] == [2, 3]
    assert simple(tmp_path, 6, resume="r:epoch=1")[0] == [4, 5]
    assert simple(tmp_path, 6, run="other", resume="r:epoch=1")[0] == [2, 3, 4, 5]
    assert simple(tmp_path, 7, run="other", resume="r:epoch=1")[0] == [6]
    with pytest.raises(pp.errors.NotFoundError):
        simple(tmp_path, 7, resume="r:epoch=70")
    with pytest.raises(pp.errors.ConfigError):
        simple(tmp_path, 7, resume="perhaps")


def test_the_history_after_rewinding_is_that_of_the_newest_branch(tmp_path):
    simple(tmp_path, 4)
    first = pp.open(tmp_path).run("r").history()
    simple(tmp_path, 3, resume="r:epoch=0")
    history = pp.open(tmp_path).run("r").history()
    assert [report.epoch for report in history] == [0, 1, 2]
    assert [report.report for report in history] == [1, 2, 3]
    assert history[0] == first[0]
    assert [c.epoch for c in kept(tmp_path)] == [0, 1, 2, 3, 1, 2]
    assert [report.metrics for report in history] == [report.metrics for report in first[:3]]  # the same training
    assert pp.open(tmp_path).run("r").find("r@latest").epoch == 2


def test_early_stopping_counts_the_newest_branch_only(tmp_path):
    stop = pp.EarlyStopping("x", "min", patience=2)
    for epoch in range(4):
        with checkpointer(tmp_path, stop=stop) as ckpt:
            for now in ckpt.epochs(epoch + 1):
                ckpt.report(x=now)
    with checkpointer(tmp_path, stop=stop) as ckpt:
        assert list(ckpt.epochs(9)) == []
    with checkpointer(tmp_path, stop=stop, resume="r:epoch=0") as ckpt:
        assert next(ckpt.epochs(9)) == 1


def damage(checkpoint, name="model.safetensors"):
    path = checkpoint.path / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_is_passed_over_with_a_warning(tmp_path, name):
    simple(tmp_path, 3)
    newest = kept(tmp_path)[-1]
    assert (newest.path / name).is_file()
    damage(newest, name)
    with pytest.warns(pp.PeakpointWarning, match="skipped a checkpoint"):
        assert simple(tmp_path, 4)[0] == [2, 3]
    assert newest.path.is_dir()


def test_when_all_are_damaged_nothing_is_guessed(tmp_path):
    simple(tmp_path, 2)
    for checkpoint in kept(tmp_path):
        damage(checkpoint)
    with pytest.raises(pp.errors.CorruptError, match="no checkpoint of run 'r' is whole"):
        simple(tmp_path, 4)
    assert simple(tmp_path, 1, resume="never")[0] == [0]


def test_a_state_that_does_not_fit_is_refused_and_not_touched(tmp_path):
    simple(tmp_path, 2)
    model, optimizer = parts(5, width=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        with pytest.raises(pp.errors.MismatchError, match=r"0\.weight") as caught:
            ckpt.resume()
        assert len(caught.value.differences) >= 3
    assert same(before, dict(model.state_dict()))
    assert len(kept(tmp_path)) == 2


def test_without_strict_what_fits_is_restored(tmp_path):
    simple(tmp_path, 2)
    model, _ = parts(5)
    with checkpointer(tmp_path, strict=False, state={"model": model, "more": {"a": 1}}) as ckpt:
        with pytest.warns(pp.PeakpointWarning, match="not restored"):
            report = ckpt.resume()
        assert report.missing
        assert ckpt.resume() is report
    assert same(dict(model.state_dict()), dict(pp.load("r@latest", root=tmp_path)["model"]))


def test_shorter_data_is_refused(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        for _ in ckpt.epochs(1):
            for number, _ in enumerate(ckpt.batches(iter(range(4)))):
                if number == 2:
                    ckpt.report()
                    break
            break
    with checkpointer(tmp_path) as ckpt:
        next(ckpt.epochs(1))
        with pytest.raises(pp.errors.MismatchError, match="ends after 1"):
            next(ckpt.batches(iter(range(1))))


def test_steps_made_before_the_first_report_are_counted(tmp_path):
    model, optimizer = parts()
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for _ in range(3):
            train(model, optimizer)
        assert ckpt.report().step == 3


def test_an_older_best_that_is_cut_short_does_not_keep_a_good_one_from_being_saved(tmp_path):
    keep = [pp.Best("acc", "max"), pp.Last(1)]
    with checkpointer(tmp_path, keep=keep) as ckpt:
        for step, accuracy in enumerate([0.9, 0.1], 1):
            ckpt.report(step=step, acc=accuracy)
    broken = kept(tmp_path)[0]
    (broken.path / "model.safetensors").unlink()  # others may share its bytes
    (broken.path / "model.safetensors").write_bytes(b"")
    with checkpointer(tmp_path, keep=keep) as ckpt:
        ckpt.resume()
        for step, accuracy in enumerate([0.8, 0.2], 3):
            ckpt.report(step=step, acc=accuracy)
    assert [one.step for one in kept(tmp_path)] == [1, 3, 4], "the damaged one is left for people to look at"
