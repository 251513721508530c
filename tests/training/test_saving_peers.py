"""What is saved and kept beside the packages that people come from: the rows of docs/differences.md, one test each.

The real callbacks of Lightning and Keras and the real manager of Orbax get the same values as a ``Checkpointer``.
"""

import inspect
import logging
import math
import os
import re
import warnings
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import peakpoint as pp
from failing import Failing
from peakpoint.store import LocalStore
from training import checkpointer, kept, same

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"
NAN, INF = math.nan, math.inf
BEST = (pp.Best("m", "max"),)
ROWS = []  # the rows that have a test, in order
peers = pytest.mark.filterwarnings("ignore")  # what they warn of is theirs


def row(title):
    """A slow test of the row of that title."""

    def decorate(test):
        ROWS.append(title)
        return pytest.mark.slow(peers(test))

    return decorate


def names_in(directory):
    return " ".join(sorted(path.name for path in Path(directory).iterdir()))


def missing(package):
    return pytest.importorskip(package, reason="needs the extra peers: make slow, or pip install -e '.[peers]'")


@pytest.fixture(scope="module")
def lightning():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        package = missing("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(package.LightningModule):
        def __init__(self, values, at_end):
            super().__init__()
            self.values, self.at_end, self.layer = values, at_end, torch.nn.Linear(1, 1)

        def training_step(self, batch, _):
            return self.layer(batch).sum()

        def on_train_epoch_end(self):
            if self.values[self.current_epoch] is not None:
                self.log("m", torch.tensor(self.values[self.current_epoch], dtype=torch.float64))

        def on_train_end(self):
            self.at_end(self.trainer, self)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.zeros(2, 1), batch_size=1)

    def fit(directory, values, ckpt_path=None, *, at_end=lambda callback, *_: None, **options):
        """Train an epoch for each value; the callback, whose checkpoints are in ``epochs``."""
        callback = ModelCheckpoint(directory, **{"filename": "{epoch}", "monitor": "m", "mode": "max"} | options)
        trainer = package.Trainer(
            max_epochs=len(values),
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback],
            default_root_dir=directory,
        )
        trainer.fit(Module(values, partial(at_end, callback)), ckpt_path=ckpt_path)
        callback.epochs = sorted(int(number) for number in re.findall(r"epoch=(\d+)", names_in(directory)))
        return callback

    return SimpleNamespace(fit=fit, callback=ModelCheckpoint)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))  # or it writes to the user's
        package = missing("keras")

    @package.saving.register_keras_serializable()
    class Layer(package.layers.Dense):
        refuses = False

        def save_own_variables(self, store):
            super().save_own_variables(store)
            if self.refuses:
                raise OSError("the disk refuses")

    def model(weight=0.0):
        made = package.Sequential([package.layers.Input((1,)), Layer(1)])
        made.compile("sgd", "mse")
        made.layers[0].set_weights([np.full((1, 1), weight), np.zeros(1)])
        return made

    def fit(directory, values, first=0, name="{epoch}.weights.h5", **options):
        """End an epoch for each value; the callback, whose checkpoints are in ``epochs``."""
        options = {"monitor": "m", "mode": "max", "save_best_only": True} | options
        callback = package.callbacks.ModelCheckpoint(f"{directory}/{name}", save_weights_only=True, **options)
        callback.set_model(model())
        callback.on_train_begin()
        for epoch, value in enumerate(values, first):
            callback.on_epoch_begin(epoch)
            callback.model.layers[0].set_weights([np.full((1, 1), float(epoch)), np.zeros(1)])
            callback.on_epoch_end(epoch, {} if value is None else {"m": value})
        callback.epochs = sorted(int(number) - 1 for number in re.findall(r"(\d+)\.weights", names_in(directory)))
        return callback

    def weight(path):
        loaded = model()
        loaded.load_weights(path)
        return float(loaded.layers[0].get_weights()[0][0, 0])

    return SimpleNamespace(fit=fit, model=model, weight=weight, callbacks=package.callbacks)


@pytest.fixture(scope="module")
def orbax():
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setenv("JAX_PLATFORMS", "cpu")
        package = missing("orbax.checkpoint")

    def save(directory, values, steps=None, **options):
        """Save once for each value; the steps that are there, the best, and those that were not skipped."""
        manager = package.CheckpointManager(directory, options=package.CheckpointManagerOptions(**options))
        saved = []
        for step, value in zip(steps or range(len(values)), values, strict=True):
            item = package.args.StandardSave({"x": np.full(2, step) if value != "refused" else object()})
            if manager.save(step, args=item, metrics=None if value in (None, "refused") else {"m": value}):
                saved.append(step)
        manager.wait_until_finished()
        best = manager.best_step() if "best_fn" in options else None
        manager.close()
        return SimpleNamespace(steps=list(manager.all_steps()), best=best, saved=saved)

    best = {"best_fn": lambda metrics: metrics["m"], "best_mode": "max", "max_to_keep": 1}
    return SimpleNamespace(save=save, best=best, package=package)


@pytest.fixture
def directory(tmp_path):
    """Makes new directories."""

    def make():
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        return path

    return make


def here(root, values, keep=BEST, steps=None):
    """Report each value in a loop over epochs, or at steps; the checkpoints that are kept, with their steps."""
    with checkpointer(root, state={"x": {"w": torch.zeros(1)}}, keep=list(keep)) as ckpt:
        resumed = ckpt.resume()
        done = 0 if resumed is None else resumed.step
        for number, value in zip(steps or ckpt.epochs(done + len(values)), values, strict=True):
            ckpt.report({} if value is None else {"m": value}, **({"step": number} if steps else {}))
    return [checkpoint.step for checkpoint in kept(root)]


def defaults(callback):
    return {name: parameter.default for name, parameter in inspect.signature(callback).parameters.items()}


@row("direction")
def test_direction(lightning, keras, orbax, directory):
    assert defaults(lightning.callback)["mode"] == "min"
    assert keras.fit(directory(), [0.9, 0.1], monitor="val_loss", mode="auto").monitor_op(1, 2)
    assert defaults(orbax.package.CheckpointManagerOptions)["best_mode"] == "max"
    with pytest.raises(pp.errors.ConfigError, match="mode"):
        pp.Best("accuracy")


@row("NaN")
def test_nan(lightning, keras, orbax, directory):
    assert lightning.fit(directory(), [NAN]).epochs == [0]  # the best, for lack of another
    assert lightning.fit(directory(), [NAN, 0.1, NAN]).epochs == [1]
    assert keras.fit(directory(), [NAN, 0.1, 0.2]).epochs == [0]  # nothing is better any more
    assert keras.fit(directory(), [0.1, NAN]).epochs == [0]
    assert orbax.save(directory(), [0.1, NAN], **orbax.best).best == 1
    assert orbax.save(directory(), [0.3, NAN, 0.1], **orbax.best).steps == [2]  # the best has been removed
    assert here(directory(), [NAN, 0.1, NAN]) == [2, 3]  # the last for being the last
    root = directory()
    here(root, [NAN])
    with pytest.raises(pp.errors.NotFoundError):
        pp.open(root).run("r").best("m")


@row("infinities")
def test_infinities(lightning, keras, orbax, directory):
    assert lightning.fit(directory(), [0.1, INF, 0.2]).epochs == [1]
    assert keras.fit(directory(), [0.1, INF, 0.2]).epochs == [0, 1]
    assert orbax.save(directory(), [0.1, INF, 0.2], **orbax.best).steps == [1]
    assert here(directory(), [0.1, INF, 0.2]) == [3]


@row("equal values")
def test_equal_values(lightning, keras, orbax, directory):
    assert lightning.fit(directory(), [0.5, 0.5]).epochs == [0]
    assert keras.fit(directory(), [0.5, 0.5]).epochs == [0]
    assert orbax.save(directory(), [0.5, 0.5], **orbax.best).steps == [1]
    assert here(directory(), [0.5, 0.5, 0.1]) == [1, 3]


@row("the best k")
def test_the_best_k(lightning, keras, orbax, directory):
    values = [0.3, 0.1, 0.2, 0.2, 0.4]
    assert lightning.fit(directory(), values, save_top_k=3).epochs == [0, 3, 4]
    assert orbax.save(directory(), values, **orbax.best | {"max_to_keep": 3}).steps == [0, 3, 4]
    assert here(directory(), values, [pp.TopK("m", "max", 3)]) == [1, 3, 5]
    assert lightning.fit(directory(), [NAN, 0.1], save_top_k=2).epochs == [0, 1]  # filled up with what is no value
    assert here(directory(), [NAN, 0.1], [pp.TopK("m", "max", 2)]) == [2]
    assert not [name for name in defaults(keras.callbacks.ModelCheckpoint) if "top" in name or "max" in name]


@row("metric is missing")
def test_metric_is_missing(lightning, keras, orbax, directory):
    assert lightning.fit(directory(), [None, None]).epochs == []
    assert keras.fit(directory(), [None, None]).epochs == [0, 1]  # saved all the same
    assert orbax.save(directory(), [0.1, None, 0.5, None], **orbax.best).steps == [1, 2, 3]  # those are never removed
    assert here(directory(), [0.1, None, 0.5, None]) == [3, 4]


@row("every n")
def test_every_n(lightning, keras, orbax, directory):
    steps = [4, 7, 9, 13, 14, 17]
    assert lightning.fit(directory(), [0.1] * 5, save_top_k=-1, every_n_epochs=2).epochs == [1, 3]
    assert orbax.save(directory(), [0.1] * 6, steps, save_interval_steps=3).steps == [4, 9]  # the first, and multiples
    assert here(directory(), [0.1] * 6, [pp.Every(steps=3)], steps) == [4, 7, 9, 13, 17]  # none is missed
    path = directory()
    callback = keras.callbacks.ModelCheckpoint(f"{path}/x.weights.h5", save_weights_only=True, save_freq=2)
    callback.set_model(keras.model())
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    saved = []
    for batch in range(5):
        callback.on_train_batch_end(batch, {})
        saved += [file.unlink() or batch for file in list(path.iterdir())]
    assert saved == [1, 3]  # batches, whatever the epoch


@row("every n minutes")
def test_every_n_minutes(lightning, keras, orbax, directory, monkeypatch):
    clock = iter([0.0, *(minute * 60.0 for minute in (50, 70, 120, 131))])  # at the start, then at each batch
    monkeypatch.setattr("lightning.pytorch.callbacks.model_checkpoint.time", SimpleNamespace(monotonic=clock.__next__))
    path, interval = directory(), timedelta(minutes=60)
    lightning.fit(path, [0.1, 0.2], monitor=None, save_top_k=-1, train_time_interval=interval, filename="{step}")
    assert names_in(path) == "step=2.ckpt step=4.ckpt"  # an hour after the start, and after the save before
    policy = orbax.package.checkpoint_managers.ContinuousCheckpointingPolicy(minimum_interval_secs=3600)
    context = orbax.package.checkpoint_managers.DecisionContext(
        is_saving_in_progress=False,
        reached_preemption=False,
        multiprocessing_options=orbax.package.options.MultiprocessingOptions(),
    )
    start = datetime(2026, 3, 1, 12, 50, tzinfo=UTC)

    def at(minutes):
        return SimpleNamespace(step=minutes, time=start + timedelta(minutes=minutes))

    assert [policy.should_save(at(minutes), [at(0)], context=context) for minutes in (20, 59, 60)] == [
        False,
        False,
        True,
    ]
    assert not [name for name in defaults(keras.callbacks.ModelCheckpoint) if "time" in name or "interval" in name]
    moments = [start + timedelta(minutes=minutes) for minutes in (0, 20, 59, 70)]  # 12:50, 13:10, 13:49, 14:00
    times = dict(enumerate(moments))
    root = directory()
    ckpt = checkpointer(root, keep=[pp.Every(minutes=60)], clock=lambda: times[0])
    for number in range(4):
        times[0] = moments[number]
        ckpt.report(m=0.1)
    ckpt.close()
    assert [checkpoint.step for checkpoint in kept(root)] == [1, 2, 4]  # the first of each hour of the clock


@row("same step again")
def test_same_step_again(lightning, keras, orbax, directory):

    def again(callback, trainer, module):
        callback.on_train_epoch_end(trainer, module)

    def again_as_if_later(callback, trainer, module):
        callback._last_global_step_saved -= 1
        callback.on_train_epoch_end(trainer, module)

    for at_end, there in ((again, "epoch=0.ckpt"), (again_as_if_later, "epoch=0.ckpt epoch=1.ckpt")):
        path = directory()
        lightning.fit(path, [0.1], at_end=at_end, save_top_k=-1)
        assert names_in(path) == there
    path = directory()
    keras.fit(path, [0.1, 0.2], name="best.weights.h5")
    assert names_in(path) == "best.weights.h5"
    assert orbax.save(directory(), [0.1, 0.2], [3, 3]).saved == [3]
    assert here(directory(), [0.1, 0.2], [pp.Last(9)], [3, 3]) == [3, 3]
    root = directory()
    here(root, [0.1, 0.2], BEST, [3, 3])
    assert [(checkpoint.step, checkpoint.metrics["m"]) for checkpoint in kept(root)] == [(3, 0.2)]


@row("an earlier step")
def test_an_earlier_step(orbax, directory):
    assert orbax.save(directory(), [0.1, 0.2], [5, 3]).saved == [5]  # skipped, without a word
    assert here(directory(), [0.1, 0.2], [pp.Last(9)], [5, 3]) == [5, 3]


@row("before the first step")
def test_before_the_first_step(lightning, keras, orbax, directory):
    assert lightning.fit(directory(), [0.1], every_n_epochs=2).epochs == []
    assert keras.fit(directory(), [0.3, 0.6], initial_value_threshold=0.5).epochs == [1]
    assert orbax.save(directory(), [0.1], [0], save_interval_steps=100).steps == [0]
    assert here(directory(), []) == []
    with checkpointer(directory(), keep=BEST) as ckpt:
        assert ckpt.save("before the first step").saved


@row("at the end")
def test_at_the_end(lightning, keras, orbax, directory):
    assert lightning.fit(directory(), [0.9, 0.1]).epochs == [0]
    path = directory()
    lightning.fit(path, [0.9, 0.1], save_last=True)
    assert (path / "last.ckpt").exists()
    backup = directory() / "backup"
    keras.model().fit(
        np.zeros((4, 1)), np.zeros((4, 1)), epochs=2, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(backup)]
    )
    assert not backup.exists()
    assert orbax.save(directory(), [0.9, 0.1], **orbax.best).steps == [0]
    assert here(directory(), [0.9, 0.1]) == [1, 2]


@row("the best after a restart")
def test_the_best_after_a_restart(lightning, keras, orbax, directory):
    first = directory()
    lightning.fit(first, [0.3, 0.9], save_last=True)
    assert lightning.fit(directory(), [0.3, 0.9, 0.5], first / "last.ckpt").epochs == [2]  # in another directory
    assert lightning.fit(first, [0.3, 0.9, 0.5], first / "last.ckpt", save_last=True).epochs == [1]
    path = directory()
    keras.fit(path, [0.3, 0.9], name="best.weights.h5")
    keras.fit(path, [0.5], first=2, name="best.weights.h5")
    assert keras.weight(path / "best.weights.h5") == 2.0  # the better one is lost
    path = directory()
    orbax.save(path, [0.3, 0.9], **orbax.best)
    assert orbax.save(path, [0.5], [2], **orbax.best).steps == [1]
    root = directory()
    here(root, [0.3, 0.9])
    assert here(root, [0.5]) == [2, 3]
    assert pp.open(root).run("r").best("m").step == 2


@row("a save that fails")
def test_a_save_that_fails(lightning, keras, orbax, directory):
    for make in (
        lambda path: keras.callbacks.ModelCheckpoint(
            f"{path}/latest.weights.h5", "m", mode="max", save_best_only=True, save_weights_only=True
        ),
        keras.callbacks.BackupAndRestore,
    ):
        path = directory()
        callback, model = make(path), keras.model(1.0)
        callback.set_model(model)
        callback.on_train_begin()
        callback.on_epoch_begin(0)
        callback.on_epoch_end(0, {"m": 0.1})
        model.layers[0].set_weights([np.full((1, 1), 2.0), np.zeros(1)])
        model.layers[0].refuses = True
        with pytest.raises(OSError, match="the disk refuses"):
            callback.on_epoch_end(1, {"m": 0.2})
        assert keras.weight(path / "latest.weights.h5") == 2.0  # it wrote over the one before
    path = directory()
    orbax.save(path, [None], max_to_keep=1)
    with pytest.raises(ValueError, match="object"):
        orbax.save(path, ["refused"], [1], max_to_keep=1)
    assert (path / "0").exists()
    root, ops = directory(), Failing("fsync", "x.safetensors")
    here(root, [0.1])
    ckpt = checkpointer(LocalStore(root, ops), state={"x": {"w": torch.zeros(1)}}, keep=BEST)
    ckpt.resume()
    ops.arm(math.inf)
    ckpt.report(m=0.2)
    with pytest.raises(pp.SaveFailedError):
        ckpt.close()
    assert [checkpoint.metrics["m"] for checkpoint in kept(root)] == [0.1]
    assert same(pp.load("r@latest", root=root)["x"]["w"], torch.zeros(1))


@row("power cuts")
def test_power_cuts(lightning, keras, directory, monkeypatch):
    fsync, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or fsync(fd))
    lightning.fit(directory(), [0.1, 0.2])
    keras.fit(directory(), [0.1, 0.2])
    assert synced == []
    here(directory(), [0.1, 0.2])
    assert synced != []


def test_every_row_of_the_page_has_a_test():
    lines = PAGE.read_text().splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and not line.startswith("| |")]
    assert rows == ROWS
