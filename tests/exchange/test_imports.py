"""Import: what scripts and tools have written becomes a run like any other, and nothing in a file is ever run."""

import csv
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import peakpoint as pp
from commands import in_process
from foreign_files import (
    ACCURACY,
    Call,
    Net,
    hostile,
    lying_dtype,
    objects,
    on_distributed,
    plain_pickle,
    read_alone,
    replace_in_pickle,
    script,
    train_epoch,
)
from peakpoint.cli.main import cli
from peakpoint.exchange import metric_logs, pickles
from peakpoint.exchange.metric_logs import LogRow
from peakpoint.exchange.moments import timeline
from peakpoint.format.events import Opened
from peakpoint.repository import audit
from peakpoint.rules import history as histories
from peakpoint.state.tensor_files import read_safetensors
from training import QuietCheckpointer, same

BEST = "val_accuracy"


class At:
    def __init__(self, epoch, step):
        self.epoch, self.step, self.metrics = epoch, step, {}

    def __repr__(self):
        return f"At({self.epoch}, {self.step})"


def bring(path, root, run="r", **options):
    return pp.import_checkpoints(path, root, run=run, **options)


def invoke(*arguments, code=0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of a script, and its live objects at the end."""
    folder = tmp_path_factory.mktemp("foreign") / "script"
    return folder, script(folder)


@pytest.fixture(scope="module")
def master(made, tmp_path_factory):
    """A repository into which the folder was imported, never changed."""
    root = tmp_path_factory.mktemp("master")
    bring(made[0], root)
    return root


@pytest.fixture
def imported(master, tmp_path):
    return shutil.copytree(master, tmp_path / "root")


# --- a script's folder --------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_run_with_its_history(made, tmp_path):
    folder, _ = made
    before = {path: path.read_bytes() for path in folder.iterdir()}
    report = bring(folder, tmp_path / "root")
    run = pp.open(tmp_path / "root").run("r")
    found = run.checkpoints()
    assert [one.epoch for one in found] == [0, 1, 2, 3, 4], "by epoch, not by name"
    assert [one.step for one in found] == [2, 4, 6, 8, 10], "from the optimizer's state"
    assert [one.metrics["val_accuracy"] for one in found] == ACCURACY
    assert [one.metrics["best_acc1"] for one in found] == [0.3, 0.5, 0.7, 0.7, 0.7]
    assert found[2].metrics.keys() == {"val_accuracy", "val/loss", "best_acc1", "sparsity"}
    assert run.best("val_accuracy", mode="max").epoch == 2
    assert [one.metrics["val_accuracy"] for one in run.history()] == ACCURACY
    assert audit.audit(pp.open(tmp_path / "root"), deep=True).clean
    assert {one.status for one in report.checkpoints} == {"imported"}
    opened = histories.newest_event(run.events(), Opened)
    assert "adamw" in opened.state["optimizer"]
    assert opened.by["source"] == str(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_everything_that_is_no_part_is_kept_as_it_was(made, imported):
    folder, _ = made
    given = torch.load(folder / "e7.pth", weights_only=False)
    loaded = pp.load("r:epoch=2", root=imported)
    assert same(dict(loaded["model"]), dict(given["model_state_dict"]))
    assert same(loaded["optimizer"], given["optimizer_state_dict"])
    assert loaded["scheduler"] == given["scheduler_state_dict"]
    extra = loaded["extra"]
    assert extra["args"] == vars(given["args"])
    assert (extra["when"], extra["classes"], extra["epoch"]) == (given["when"], given["classes"], 2)
    assert np.array_equal(extra["curve"], given["curve"])
    assert extra["curve"].dtype == np.dtype(">f8"), "which NumPy itself does not keep"
    assert extra["sparsity"].dtype == np.float32
    assert {*loaded, *extra} >= given.keys() - {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict"}


def test_a_training_goes_on_from_what_was_imported(made, imported):
    folder, (model, optimizer, scheduler) = made
    root = imported
    mine, ours, schedule = objects(seed=9)
    state = {"model": mine, "optimizer": ours, "scheduler": schedule}
    epochs, said = [], []

    def go_on():
        with QuietCheckpointer(root, run="r", state=state, keep=[pp.Last(1)], announce=said.append) as ckpt:
            for epoch in ckpt.epochs(7):
                if not epochs:
                    assert same(dict(mine.state_dict()), dict(model.state_dict()))
                    assert same(ours.state_dict(), optimizer.state_dict())
                    assert schedule.state_dict() == scheduler.state_dict()
                epochs.append(epoch)
                train_epoch(mine, ours, schedule)
                outcome = ckpt.report(val_accuracy=0.1)
        return outcome

    with pytest.warns(pp.PeakpointWarning, match="random generators: they are not in this checkpoint") as caught:
        outcome = go_on()
    assert [warning.filename for warning in caught] == [__file__], "at the line of the training"
    assert not any("random generators" in text for text in said), "once"
    assert epochs == [5, 6]
    assert outcome.step == 14
    there = pp.open(root).run("r").checkpoints()
    assert [one.epoch for one in there] == [0, 1, 2, 3, 4, 6], "the training's rules do not take what was imported"
    assert len(pp.open(root).run("r").history()) == 7
    with pytest.raises(pp.ConflictError, match="was not imported"):
        bring(folder, root)


def test_parts_that_the_training_has_not_are_still_a_mismatch(imported):
    model = Net()
    with (
        QuietCheckpointer(imported, run="r", state={"model": model}, keep=[pp.Last(1)]) as ckpt,
        pytest.raises(pp.errors.MismatchError, match="names no part 'optimizer'") as caught,
    ):
        ckpt.resume()
    assert "extra" not in str(caught.value)


def test_with_rules_nothing_is_pinned_and_rules_decide(made, imported):
    root = imported
    assert len(pp.open(root).run("r").pinned()) == 5
    assert bring(made[0], root, rules=[pp.Best("val_accuracy", "max"), pp.Last(1)]).reports == 5
    run = pp.open(root).run("r")
    assert run.pinned() == {}
    assert [rule.text for rule in run.rules()] == ["best:val_accuracy:max", "last:1"]
    assert {removal.manifest.epoch for removal in run.plan().remove} == {0, 1, 3}
    invoke("keep", root, "r", "--yes")
    assert {one.status for one in bring(made[0], root).checkpoints} == {"there", "removed"}
    assert [one.epoch for one in run.checkpoints()] == [2, 4], "what the rules have taken does not come back"


def test_an_import_does_not_say_which_code_has_trained(made, tmp_path):
    command = "import sys, peakpoint as pp; pp.import_checkpoints(sys.argv[1], sys.argv[2], run='r')"
    script = tmp_path / "checkout" / "script.py"
    script.parent.mkdir()
    script.write_text(command)
    git = ["git", "-C", str(script.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run([sys.executable, script, made[0], tmp_path / "root"], check=True)
    run = pp.open(tmp_path / "root").run("r")
    told = [event.by for event in run.events() if isinstance(event, Opened)]
    assert told
    assert not any("code" in by for by in (*told, *(one.written_by for one in run.manifests())))


def test_rules_by_metrics_that_nothing_has_are_refused(made, tmp_path):
    words = r"no report has the metric 'val_acuracy' of the rule best:val_acuracy:max; did you mean 'val_accuracy'"
    for dry_run in (True, False):
        with pytest.raises(pp.errors.ConfigError, match=words):
            bring(made[0], tmp_path / "root", rules=[pp.Best("val_acuracy", "max"), pp.Last(1)], dry_run=dry_run)
    assert not (tmp_path / "root").exists()
    bring(made[0], tmp_path / "root", rules=[pp.Best("later", "max", pending=2), pp.Last(1)])


def test_repeating_changes_nothing_and_new_files_are_added(made, tmp_path):
    root, folder = tmp_path / "root", shutil.copytree(made[0], tmp_path / "copy")
    later = folder / "e5.pth"
    later.rename(tmp_path / "later.pth")
    bring(folder, root)
    events = pp.open(root).run("r").events()
    again = bring(folder, root)
    assert {one.status for one in again.checkpoints} == {"there"}
    assert pp.open(root).run("r").events() == events
    (tmp_path / "later.pth").rename(later)
    assert [one.status for one in bring(folder, root).checkpoints] == ["there"] * 4 + ["imported"]
    assert [one.epoch for one in pp.open(root).run("r").history()] == [0, 1, 2, 3, 4]
    torch.save({"model": Net().state_dict(), "epoch": 1, "step": 4}, folder / "late.pth")
    with pytest.raises(pp.ConflictError, match="into another run"):
        bring(folder, root)


def test_other_files_do_not_go_into_a_run_that_an_import_has_made(made, tmp_path):
    root = tmp_path / "root"
    bring(made[0] / "e7.pth", root)
    events = pp.open(root).run("r").events()
    for path in (made[0] / "e8.pth", made[0] / "e6.pth", made[0]):
        with pytest.raises(pp.ConflictError, match=r"run 'r' holds an import of .* import all into another run"):
            bring(path, root)
    assert pp.open(root).run("r").events() == events


def test_a_moment_before_what_a_run_holds_is_refused(tmp_path):
    for epoch in (1, 3, 4):
        torch.save({"model": Net().state_dict(), "epoch": epoch, "step": 2 * epoch}, tmp_path / f"{epoch}.pth")
    bring(tmp_path, tmp_path / "root")
    (tmp_path / "3.pth").rename(tmp_path / "later.pth")
    torch.save({"model": Net().state_dict(), "epoch": 3, "step": 6}, tmp_path / "3.pth")
    with pytest.raises(pp.ConflictError, match=r"later moments than that of 3\.pth"):
        bring(tmp_path, tmp_path / "root")


def test_what_a_log_says_stays_when_more_files_come(made, tmp_path):
    root, folder = tmp_path / "root", tmp_path / "folder"
    (tmp_path / "m.json").write_text(json.dumps([{"epoch": epoch, "a": 1.0 * epoch} for epoch in range(7)]))
    folder.mkdir()
    shutil.copy(made[0] / "e9.pth", folder)
    bring(folder, root, metrics=tmp_path / "m.json")
    events = pp.open(root).run("r").events()
    with pytest.raises(pp.ConflictError, match="the same files, metrics and options"):
        bring(folder, root, rules=[pp.Last(2)])  # the one moment of the file begins the history, and is not all of it
    shutil.copy(made[0] / "e7.pth", folder)
    with pytest.raises(pp.ConflictError, match="the same files, metrics and options"):
        bring(folder, root)  # without the log, five moments would be lost
    assert pp.open(root).run("r").events() == events
    bring(folder, root, metrics=tmp_path / "m.json")
    run = pp.open(root).run("r")
    assert [(one.epoch, one.metrics["a"]) for one in run.history()] == [(epoch, epoch) for epoch in range(7)]
    assert (run.latest().epoch, run.latest().step, run.latest().metrics["a"]) == (2, 6, 2.0)
    bring(folder, root, metrics=tmp_path / "m.json", rules=[pp.Last(2)])
    assert len(run.history()) == 7


@pytest.mark.parametrize(
    ("epochs", "steps", "cut"), [([0, 1, 7], True, 1), ([3, 4, 9, 30], False, 3), ([0, 2], False, 0)]
)
def test_an_import_in_two_goes_is_one_import(epochs, steps, cut, tmp_path_factory):
    folder, root = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("root")

    def moments(run):
        checkpoints = pp.open(root).run(run).manifests()
        return [(each.report, each.epoch, each.step, each.sequence, each.metrics) for each in checkpoints]

    for number, epoch in enumerate(epochs):
        if number == cut and cut:
            bring(folder, root, run="grown")
        step = {"step": 10 * epoch} if steps else {}
        torch.save({"model": {"w": torch.tensor([epoch])}, "epoch": epoch, "acc": 0.1, **step}, folder / f"{epoch}.pth")
    for run in ("grown", "at-once"):
        bring(folder, root, run=run)
    assert moments("grown") == moments("at-once")
    assert [report.metrics for report in pp.open(root).run("grown").history()] == [{"acc": 0.1}] * len(epochs)


def test_an_import_that_is_killed_goes_on(made, tmp_path):
    root = tmp_path / "root"
    code = (
        "import os, signal, sys, peakpoint as pp\n"
        "n = 0\n"
        "def die(_):\n"
        "    global n\n"
        "    n += 1\n"
        "    if n == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pp.import_checkpoints(sys.argv[1], sys.argv[2], run='r', progress=die)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made[0]), str(root)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(pp.open(root).run("r").checkpoints()) == 3
    assert [one.status for one in bring(made[0], root).checkpoints] == ["there"] * 3 + ["imported"] * 2
    run = pp.open(root).run("r")
    assert [one.epoch for one in run.history()] == [0, 1, 2, 3, 4]
    assert [one.sequence for one in run.checkpoints()] == [1, 2, 3, 4, 5]
    assert len(run.pinned()) == 5
    assert audit.audit(pp.open(root), deep=True).clean


def test_a_file_that_changes_meanwhile_is_noticed(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")

    def write(_):
        with (folder / "e7.pth").open("ab") as file:
            file.write(b"more")

    with pytest.raises(pp.errors.CorruptError, match=r"e7\.pth"):
        bring(folder, tmp_path / "root", progress=write)
    assert [one.epoch for one in pp.open(tmp_path / "root").run("r").checkpoints()] == [0, 1]
    assert audit.audit(pp.open(tmp_path / "root"), deep=True).clean


def test_two_files_of_one_moment_both_come_in(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    best = torch.load(folder / "e7.pth", weights_only=False)
    torch.save({**best, "note": "the best"}, folder / "best.pth")
    bring(folder, tmp_path / "root")
    run = pp.open(tmp_path / "root").run("r")
    assert [one.epoch for one in run.checkpoints()] == [0, 1, 2, 2, 3, 4]
    assert [one.epoch for one in run.history()] == [0, 1, 2, 3, 4]
    assert run.latest().epoch == 4


def test_a_copy_comes_in_once(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    shutil.copy(folder / "e7.pth", folder / "z_best.pth")
    torch.save(Net().state_dict(), folder / "bare.pth")
    shutil.copy(folder / "bare.pth", folder / "bare-2.pth")
    for again in (False, True):
        done = {one.path.name: one for one in bring(folder, tmp_path / "root").checkpoints}
        assert done["e7.pth"].status == ("there" if again else "imported")
        assert done["z_best.pth"].status == "twin"
        assert "same bytes as e7.pth" in done["z_best.pth"].notes[-1]
        assert "same bytes as bare-2.pth" in done["bare.pth"].notes[-1]
    assert len(pp.open(tmp_path / "root").run("r").checkpoints()) == 6


def test_other_options_for_what_is_there_are_refused(tmp_path):
    torch.save({"model": Net().state_dict(), "epoch": 3}, tmp_path / "a.pth")
    bring(tmp_path / "a.pth", tmp_path / "root")
    with pytest.raises(pp.ConflictError, match="an import of other files, metrics or options"):
        bring(tmp_path / "a.pth", tmp_path / "root", epochs_from=1)
    (tmp_path / "m.json").write_text('[{"epoch": 3, "acc": NaN}]')
    with pytest.raises(pp.ConflictError, match="an import of other files, metrics or options"):
        bring(tmp_path / "a.pth", tmp_path / "root", metrics=tmp_path / "m.json")
    for _ in range(2):
        bring(tmp_path / "a.pth", tmp_path / "root", run="s", metrics=tmp_path / "m.json")


def test_names_that_parts_and_metrics_cannot_have_are_changed(tmp_path):
    state = {"net/G": Net().state_dict(), "extra": Net().state_dict(), "acc @1: \udcff": 0.5, "epoch": 1e300}
    torch.save(state, tmp_path / "a.pth")
    bring(tmp_path / "a.pth", tmp_path / "root", parts={"net/G": "model"})
    [one] = pp.open(tmp_path / "root").run("r").checkpoints()
    assert (one.epoch, one.metrics) == (None, {"acc_@1_?": 0.5})
    assert {"model", "my_extra", "extra"} <= one.parts.keys()
    odd = tmp_path / os.fsdecode(b"b\xff.pth")
    shutil.copy(tmp_path / "a.pth", odd)
    with pytest.raises(pp.errors.ConfigError, match="cannot be written as UTF-8"):
        bring(odd, tmp_path / "other", parts={"net/G": "model"})


def test_prefixes_parts_and_first_epochs_are_as_said(tmp_path):
    model = torch.nn.DataParallel(torch.nn.Linear(2, 1))
    torch.save({"gen": model.state_dict(), "disc": Net().state_dict(), "epoch": 1, "step": 7}, tmp_path / "a.pth")
    bring(tmp_path / "a.pth", tmp_path / "root", run="kept", parts={"gen": "model"})
    loaded = pp.load("kept@latest", root=tmp_path / "root")
    assert list(loaded["model"]) == ["module.weight", "module.bias"]
    assert list(loaded) == ["model", "disc", "extra"]
    bring(
        tmp_path / "a.pth",
        tmp_path / "root",
        run="bare",
        parts={"gen": "model", "disc": "extra"},
        strip_prefix="module.",
        epochs_from=1,
    )
    loaded = pp.load("bare@latest", root=tmp_path / "root")
    assert list(loaded["model"]) == ["weight", "bias"]
    assert list(loaded) == ["model", "extra"]
    with pytest.raises(pp.errors.ConfigError, match="no name of a tensor begins with it"):
        bring(tmp_path / "a.pth", tmp_path / "root", run="x", parts={"gen": "model"}, strip_prefix="modul.")
    shortened = read_alone(tmp_path / "a.pth", parts={"gen": "model"}, strip_prefix="module.w")
    assert "'module.w' was taken from 1 of 2 names of tensors" in shortened.notes
    assert pp.open(tmp_path / "root").run("bare").latest().epoch == 0
    with pytest.raises(pp.errors.FormatError, match="the file has no 'generator'; it has gen"):
        read_alone(tmp_path / "a.pth", parts={"generator": "model"})


def test_parts_of_files_without_names_are_renamed_too(tmp_path):
    save_file(Net().state_dict(), tmp_path / "a.safetensors")
    torch.save(Net().state_dict(), tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        assert list(read_alone(tmp_path / name, parts={"model": "teacher"}).parts) == ["teacher"]
        with pytest.raises(pp.errors.FormatError, match="has no 'modell'; it has model"):
            read_alone(tmp_path / name, parts={"modell": "teacher"})
    bring(tmp_path / "a.safetensors", tmp_path / "root", parts={"model": "teacher"})
    assert list(pp.load("r@latest", root=tmp_path / "root")) == ["teacher"]


def test_a_repository_is_no_source(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    bring(folder, folder / "runs")
    again = bring(folder, folder / "runs")
    assert [one.status for one in again.checkpoints] == ["there"] * 5
    assert again.others == (folder / "runs",)


def test_bare_weights_come_before_what_knows_its_moment(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    torch.save(Net().state_dict(), folder / "zz_final.pth")
    report = bring(folder, tmp_path / "root")
    assert report.checkpoints[0].path.name == "zz_final.pth"
    assert any("neither epoch nor step" in note for note in report.notes)
    assert pp.open(tmp_path / "root").run("r").latest().epoch == 4


@pytest.mark.parametrize("options", [{"_use_new_zipfile_serialization": False}, {}])
def test_both_formats_of_torch_are_read(options, tmp_path):
    script(tmp_path / "s", epochs=1, **options)
    bring(tmp_path / "s", tmp_path / "root")
    given = torch.load(tmp_path / "s" / "e9.pth", weights_only=False)
    assert same(pp.load("r@latest", root=tmp_path / "root")["optimizer"], given["optimizer_state_dict"])


# --- what means harm ----------------------------------------------------------------------------------------------


def test_hostile_files_are_refused_by_name_and_nothing_is_run(made, tmp_path):
    folder, mark = shutil.copytree(made[0], tmp_path / "copy"), tmp_path / "PWNED"
    kinds = ("os.system", "eval", "optimizer", "legacy", "class")
    globals_named = {kind: hostile(kind, folder / f"model_{kind}.pth", mark) for kind in kinds}
    with pytest.raises(pp.errors.FormatError) as caught:
        bring(folder, tmp_path / "root")
    for word in ("model_", ".pth", "was not loaded", "--skip-unreadable", "Nothing was imported"):
        assert word in str(caught.value)
    assert not (tmp_path / "root").exists()
    for kind, name in globals_named.items():
        with pytest.raises(pp.errors.FormatError, match=rf"model_{kind}\.pth was not loaded: .*{re.escape(name)}"):
            read_alone(folder / f"model_{kind}.pth")
    assert not mark.exists()
    done = in_process("import", folder, tmp_path / "root", "--run", "r", "--skip-unreadable")
    assert done.returncode == 13
    assert all(name in done.stderr for name in globals_named.values())
    assert "Traceback" not in done.stderr
    assert len(pp.open(tmp_path / "root").run("r").checkpoints()) == 5
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["os.system", "eval", "legacy"])
def test_nobody_is_advised_to_load_what_means_harm(kind, tmp_path):
    named = hostile(kind, tmp_path / "a.pth", tmp_path / "PWNED")
    with pytest.raises(pp.errors.FormatError, match="may be hostile") as caught:
        read_alone(tmp_path / "a.pth")
    assert "--inert" not in str(caught.value)
    done = in_process("import", tmp_path / "a.pth", tmp_path / "root", "--run", "r", "--inert", named)
    assert done.returncode == 2
    assert "only plain classes of your own code" in done.stderr
    for other in ("nt.system", "subprocess.Popen", "sys.exit", "torch._utils._rebuild_qtensor", "Config"):
        with pytest.raises(pp.errors.ConfigError, match="only plain classes"):
            bring(tmp_path / "a.pth", tmp_path / "root", inert=[other])


@pytest.mark.parametrize("name", ["os.getcwd", "subprocess.Popen", "builtins.exec", "nt.system", "torch.hub.load"])
def test_names_that_run_code_end_the_reading(name):
    with pytest.raises(pp.errors.FormatError, match=r"may be hostile\. If you trust it, load it in an environment"):
        pickles.check_globals(["a.B", name], "x.pth")
    pickles.check_globals(["a.B", "osmosis.Config", "a.os.system"], "x.pth")


def test_what_torch_says_of_a_file_is_not_passed_on(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "x": Call(torch._utils._rebuild_tensor_v2, 1)}, tmp_path / "a.pth")
    with pytest.raises(pp.errors.CorruptError, match="its pickle cannot be built") as caught:
        read_alone(tmp_path / "a.pth")
    assert caught.value.__cause__ is None, "nor does a traceback show it"
    plain_pickle(tmp_path / "b.pth")
    with pytest.raises(pp.errors.FormatError, match="load it in an environment without anything to lose"):
        read_alone(tmp_path / "b.pth")


def test_the_hostile_files_would_work_elsewhere(tmp_path):
    mark = tmp_path / "PWNED"
    hostile("os.system", tmp_path / "a.pth", mark)
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert mark.exists(), "otherwise the tests above could not fail"


def test_a_hostile_file_inside_an_item_of_dcp_is_not_run(tmp_path):
    mark = tmp_path / "PWNED"
    on_distributed(tmp_path / "dcp", {"model": Net().state_dict(), "x": Call(os.system, f"touch {mark}")})
    with pytest.raises(pp.errors.FormatError, match=r"names posix\.system"):
        read_alone(tmp_path / "dcp")
    assert not mark.exists()


def test_metadata_of_dcp_names_its_own_classes_only(tmp_path):
    import pickle

    mark = tmp_path / "PWNED"
    on_distributed(tmp_path / "dcp", {"model": Net().state_dict()})
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {mark}")))
    with pytest.raises(pp.errors.FormatError, match=r"\.metadata was not loaded: it names posix\.system"):
        read_alone(tmp_path / "dcp")
    assert not mark.exists()


def test_torch_allowing_more_does_not_allow_it_here(tmp_path):
    torch.save({"model": Net().state_dict(), "x": Call(os.getcwd)}, tmp_path / "a.pth")
    with (
        torch.serialization.safe_globals([(os.getcwd, "posix.getcwd")]),
        pytest.raises(pp.errors.FormatError, match="getcwd"),
    ):
        read_alone(tmp_path / "a.pth")


def test_a_dtype_cannot_hide_pointers_in_bytes(tmp_path):
    torch.save({"model": Net().state_dict(), "x": lying_dtype()}, tmp_path / "a.pth")
    with pytest.raises(pp.errors.FormatError, match="NumPy elements of type 'O8'"):
        read_alone(tmp_path / "a.pth")


def test_a_plain_class_can_be_kept_as_a_record(tmp_path):
    net = Call(Net)
    net.call = (Net, (), {"training": False, "size": 3})
    torch.save({"model": Net().state_dict(), "config": net}, tmp_path / "a.pth")
    bring(tmp_path / "a.pth", tmp_path / "root", inert=["foreign_files.Net"])
    kept = pp.load("r@latest", root=tmp_path / "root")["extra"]["config"]
    assert kept == {"class": "foreign_files.Net", "state": {"training": False, "size": 3}}
    mark = tmp_path / "PWNED"
    hostile("eval", tmp_path / "b.pth", mark)
    kept = pickles.load(tmp_path / "b.pth", inert=["builtins.eval"])
    assert not mark.exists()
    assert kept["x"]["class"] == "builtins.eval"


def test_odd_files_get_clear_errors(made, tmp_path):
    source = (made[0] / "e9.pth").read_bytes()
    files = {
        "empty.pth": (b"", pp.errors.CorruptError, "is empty"),
        "text.pth": (b"hello, this is text", pp.errors.FormatError, "not a file of torch.save"),
        "short.pth": (source[: len(source) // 2], pp.errors.CorruptError, "cut short or damaged"),
        "picture.safetensors": (b"\x89PNG" * 30, pp.errors.FormatError, "not a safetensors file"),
        "tensors.pth": ((made[0] / "e9.pth").read_bytes()[:3000], pp.errors.CorruptError, "cut short"),
    }
    for name, (data, kind, words) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(kind, match=words):
            read_alone(tmp_path / name)
    plain_pickle(tmp_path / "p.pth")
    with pytest.raises(pp.errors.FormatError, match="plain pickle"):
        read_alone(tmp_path / "p.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(pp.errors.FormatError, match="holds a list"):
        read_alone(tmp_path / "list.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch does not want to be asked for this any more
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), tmp_path / "script.pt")
    with pytest.raises(pp.errors.FormatError, match="TorchScript"):
        read_alone(tmp_path / "script.pt")
    with pytest.raises(pp.errors.NotFoundError, match="does not exist"):
        bring(tmp_path / "nothing", tmp_path / "root")
    (tmp_path / "none").mkdir()
    with pytest.raises(pp.errors.FormatError, match="holds no checkpoint"):
        bring(tmp_path / "none", tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_zip_that_claims_more_than_it_has_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(50_000_000))
    with pytest.raises(pp.errors.FormatError, match=r"torch\.save wrote no such file"):
        read_alone(tmp_path / "bomb.pth")


def test_a_pickle_of_another_protocol_is_refused(tmp_path):
    import pickle

    torch.save({"model": Net().state_dict()}, tmp_path / "a.pth")
    replace_in_pickle(tmp_path / "a.pth", lambda _: pickle.dumps(Net, protocol=4))
    with pytest.raises(pp.errors.FormatError, match="protocol 4"):
        read_alone(tmp_path / "a.pth")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_byte_gets_past_with_another_error(data, made):
    source = bytearray((made[0] / "e9.pth").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    try:
        pickles.load(bytes(source), where="x.pth")
    except (pp.errors.FormatError, pp.errors.CorruptError) as error:
        assert "x.pth" in str(error)  # noqa: PT017 - it may well load, when the byte is one of a tensor


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60))
def test_no_safetensors_header_gets_past_with_another_error(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "h.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    try:
        assert read_safetensors(path)[0] == {}, "a header without tensors is one"
    except (pp.errors.FormatError, pp.errors.CorruptError) as error:
        assert "h.safetensors" in str(error)  # noqa: PT017 - see above


def test_an_old_torch_is_refused(monkeypatch, tmp_path):
    torch.save({"model": Net().state_dict()}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(pp.errors.MissingExtraError, match="CVE-2025-32434"):
        bring(tmp_path / "a.pth", tmp_path / "root")


# --- safetensors, Hugging Face, DCP -------------------------------------------------------------------------------


def test_a_linked_file_is_the_same_file(tmp_path):
    save_file(Net().state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt", "epoch": "3", "step": "90"})
    done = bring(tmp_path / "a.safetensors", tmp_path / "root", link=True)
    assert done.checkpoints[0].status == "linked"
    [one] = pp.open(tmp_path / "root").run("r").checkpoints()
    assert (one.epoch, one.step) == (3, 90)
    assert (one.path / "model.safetensors").samefile(tmp_path / "a.safetensors")
    loaded = pp.load("r@latest", root=tmp_path / "root")
    assert loaded["model"].keys() == load_file(tmp_path / "a.safetensors").keys()
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(loaded["model"][name], tensor)
    assert torch.equal(loaded.tensor("model", "conv.weight"), loaded["model"]["conv.weight"])
    assert audit.audit(pp.open(tmp_path / "root"), deep=True).clean
    with (tmp_path / "a.safetensors").open("r+b") as file:  # the danger of a link, which digests tell
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert audit.audit(pp.open(tmp_path / "root"), deep=True).of_kind("damage")


def test_what_cannot_be_linked_is_copied_and_says_so(made, tmp_path):
    done = bring(made[0], tmp_path / "root", link=True)
    assert all("copied, not linked" in one.notes[-1] for one in done.checkpoints)
    save_file({"a b": torch.ones(2)}, tmp_path / "a.safetensors")
    done = bring(tmp_path / "a.safetensors", tmp_path / "root", run="s", link=True, strip_prefix="a ")
    assert done.checkpoints[0].status == "imported"
    assert list(pp.load("s@latest", root=tmp_path / "root")["model"]) == ["b"]


def hugging_face(folder, step, *, sharded=False):
    folder.mkdir(parents=True)
    model, optimizer, scheduler = objects()
    train_epoch(model, optimizer, scheduler)
    state = model.state_dict()
    if sharded:
        names = sorted(state)
        places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
        for place in set(places.values()):
            save_file({name: state[name].clone() for name in names if places[name] == place}, folder / place)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        save_file(state, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    (folder / "config.json").write_text('{"model_type": "net"}')
    torch.save({"a": 1}, folder / "rng_state.pth")
    log = [{"epoch": at / 4, "step": at, "loss": 1 / at} for at in range(1, step + 1)]
    log += [{"epoch": at / 4, "step": at, "eval_loss": 2 / at} for at in range(4, step + 1, 4)]
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": step / 4, "global_step": step, "log_history": log}))
    return state


def test_folders_of_hugging_face(tmp_path):
    states = {step: hugging_face(tmp_path / "out" / f"checkpoint-{step}", step, sharded=step == 10) for step in (4, 10)}
    bring(tmp_path / "out", tmp_path / "root")
    run = pp.open(tmp_path / "root").run("r")
    first, second = run.checkpoints()
    assert (first.step, first.epoch, first.metrics) == (4, 0, {"loss": 0.25, "eval_loss": 0.5})
    assert (second.step, second.epoch, second.metrics) == (10, 2, {"loss": 0.1})
    assert [one.step for one in run.history()] == list(range(1, 11)), "also moments without a checkpoint"
    assert run.history()[7].metrics == {"loss": 0.125, "eval_loss": 0.25}
    for one in (first, second):
        loaded = pp.load(one.ref, root=tmp_path / "root")
        assert list(loaded) == ["model", "optimizer", "scheduler", "extra"]
        assert {name: tensor.tolist() for name, tensor in loaded["model"].items()} == {
            name: tensor.tolist() for name, tensor in states[one.step].items()
        }
        assert loaded["extra"]["config"] == {"model_type": "net"}
    (tmp_path / "out" / "checkpoint-10" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    with pytest.raises(pp.errors.CorruptError, match=r"lists '\.\./x'"):
        bring(tmp_path / "out", tmp_path / "other")


def test_a_hostile_optimizer_in_a_folder_of_hugging_face(tmp_path):
    hugging_face(tmp_path / "checkpoint-4", 4)
    hostile("os.system", tmp_path / "checkpoint-4" / "optimizer.pt", tmp_path / "PWNED")
    with pytest.raises(pp.errors.FormatError, match=r"optimizer\.pt was not loaded: it names posix\.system"):
        bring(tmp_path / "checkpoint-4", tmp_path / "root")
    assert not (tmp_path / "PWNED").exists()


def test_a_file_inside_of_a_file_stays_bytes(tmp_path):
    hostile("os.system", tmp_path / "inner.bin", tmp_path / "PWNED")
    inner = (tmp_path / "inner.bin").read_bytes()
    torch.save({"model": Net().state_dict(), "inner": inner}, tmp_path / "a.pth")
    bring(tmp_path / "a.pth", tmp_path / "root")
    assert pp.load("r@latest", root=tmp_path / "root")["extra"]["inner"] == inner
    assert not (tmp_path / "PWNED").exists()


def test_folders_of_torch_distributed(tmp_path):
    model, optimizer, scheduler = objects()
    train_epoch(model, optimizer, scheduler)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0, "list": [torch.ones(2), 3]}
    on_distributed(tmp_path / "dcp", state)
    bring(tmp_path / "dcp", tmp_path / "root")
    loaded = pp.load("r@latest", root=tmp_path / "root")
    assert {name: tensor.tolist() for name, tensor in loaded["model"].items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    assert same(loaded["optimizer"]["state"], optimizer.state_dict()["state"])
    assert loaded["extra"]["list"][1] == 3
    into = torch.optim.AdamW(Net().parameters(), lr=0.5)
    pp.load("r@latest", root=tmp_path / "root", into=into, part="optimizer")
    assert into.param_groups[0]["lr"] == 0.01
    piece = next((tmp_path / "dcp").glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-100])
    with pytest.raises(pp.errors.CorruptError, match="cut short"):
        bring(tmp_path / "dcp", tmp_path / "other")


# --- logs ---------------------------------------------------------------------------------------------------------


def write_csv(path, rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def test_lightning_s_rows_are_merged_by_epoch(tmp_path):
    rows = []
    for epoch in range(3):
        rows += [{"epoch": epoch, "step": 10 * epoch + at, "train_loss": 1 / (10 * epoch + at + 1)} for at in (4, 9)]
        rows.append({"epoch": epoch, "step": 10 * epoch + 9, "val_loss": 0.5 - epoch})
    write_csv(tmp_path / "metrics.csv", rows)
    assert metric_logs.read(tmp_path / "metrics.csv") == [
        LogRow(epoch, 10 * epoch + 9, {"train_loss": 1 / (10 * epoch + 10), "val_loss": 0.5 - epoch})
        for epoch in range(3)
    ]


RECORDS = [{"epoch": epoch, "val/acc top": 0.1 * epoch, "ok": True, "note": "x"} for epoch in range(3)]
WANTED = [LogRow(epoch, None, {"val/acc_top": 0.1 * epoch}) for epoch in range(3)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(RECORDS)),
        ("b.json", json.dumps({record["epoch"]: {"val/acc top": record["val/acc top"]} for record in RECORDS})),
        ("c.json", json.dumps({"epoch": [0, 1, 2], "val/acc top": [0.0, 0.1, 0.2]})),
        ("d.jsonl", "\n".join(map(json.dumps, RECORDS))),
        ("e.json", "\n".join(map(json.dumps, RECORDS))),
    ],
)
def test_forms_of_json(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert metric_logs.read(tmp_path / name) == WANTED


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "neither a list"),
        ("a.csv", "x,y\n1,2\n", r"no row with an epoch or a step .*; it has x, y"),
        ("a.csv", "", "no columns"),
        ("a.json", '{"epoch": 1, "a": 1}\n{"epoch": 2, "a"', "not JSON"),
        ("a.json", '{"epoch": [1], "a": [1, 2]}', "different lengths"),
    ],
)
def test_logs_that_cannot_be_are_refused(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(pp.errors.FormatError, match=words):
        metric_logs.read(tmp_path / name)


def test_tensorboard_is_read_and_joined(made, tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "tb") as writer:
        for epoch in range(7):
            writer.add_scalar("test/acc", epoch / 10, epoch)
            writer.add_scalar("new style", epoch, epoch, new_style=True)
    rows = metric_logs.read(tmp_path / "tb")
    assert [row.step for row in rows] == list(range(7))
    assert rows[3].metrics == pytest.approx({"test/acc": 0.3, "new_style": 3.0})
    report = bring(made[0], tmp_path / "root", metrics=tmp_path / "tb", join="epoch")
    run = pp.open(tmp_path / "root").run("r")
    assert run.checkpoints()[3].metrics["test/acc"] == pytest.approx(0.3)
    assert [one.epoch for one in run.history()] == list(range(7)), "later epochs without a checkpoint count"
    assert run.best("test/acc", mode="max").epoch == 4
    assert "5 of 7 rows of metrics join a checkpoint, by epoch" in report.notes
    (tmp_path / "empty").mkdir()
    with pytest.raises(pp.errors.FormatError, match="without event files"):
        metric_logs.read(tmp_path / "empty")


def test_rows_that_join_nothing_are_said(made, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([{"step": 1000, "a": 1.0}, {"epoch": 1, "a": 2.0}]))
    report = bring(made[0], tmp_path / "root", metrics=tmp_path / "m.json", join="epoch", dry_run=True)
    assert "1 of 2 rows of metrics join a checkpoint, by epoch" in report.notes


def test_a_log_that_joins_nothing_is_an_error_that_says_why(made, tmp_path):
    log = tmp_path / "m.json"
    log.write_text(json.dumps([{"epoch": epoch, "a": 1.0} for epoch in range(10)]))
    words = (
        r"no row of .*m.json joins a checkpoint by step: its 10 rows have epochs 0 to 9 and no steps, and the files "
        r"have epochs 0 to 4 and steps 2 to 10; --join epoch would join 5 of them"
    )
    with pytest.raises(pp.errors.ConfigError, match=words):
        bring(made[0], tmp_path / "root", metrics=log, join="step", dry_run=True)
    torch.save(Net().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(pp.errors.ConfigError, match=r"the files have no epochs and no steps$"):
        bring(tmp_path / "bare.pth", tmp_path / "root", metrics=log)
    assert not (tmp_path / "root").exists()


def test_epochs_that_seem_to_count_from_one_are_said(tmp_path):
    for epoch in (1, 2):
        torch.save({"model": Net().state_dict(), "epoch": epoch}, tmp_path / f"{epoch}.pth")
    [note] = [note for note in bring(tmp_path, tmp_path / "root", dry_run=True).notes if "--epochs-from 1" in note]
    assert note.startswith("the first epoch is 1")
    assert not bring(tmp_path, tmp_path / "root", epochs_from=1, dry_run=True).notes
    (tmp_path / "m.json").write_text('[{"epoch": 0, "a": 1}, {"epoch": 1, "a": 1}]')
    report = bring(tmp_path, tmp_path / "root", metrics=tmp_path / "m.json", dry_run=True)
    assert not any("--epochs-from" in note for note in report.notes)


POINTS = st.builds(At, st.none() | st.integers(0, 5), st.none() | st.integers(0, 30))
ROWS = st.builds(
    lambda epoch, step: LogRow(epoch, step, {"a": 1.0}), st.none() | st.integers(0, 7), st.none() | st.integers(0, 40)
).filter(lambda row: (row.epoch, row.step) != (None, None))


@settings(max_examples=300, deadline=None)
@given(
    points=st.lists(POINTS, max_size=6), rows=st.lists(ROWS, max_size=6), how=st.sampled_from(["auto", "epoch", "step"])
)
def test_every_checkpoint_has_one_place_and_places_are_in_order(points, rows, how):
    moments, _ = timeline(points, rows, how)
    taken = [number for moment in moments for number in moment.checkpoints]
    assert sorted(taken) == list(range(len(points)))
    known = [moment for moment in moments if moment.placed and moment.checkpoints]
    assert all(moment.step >= 0 for moment in moments)
    order = [points[moment.checkpoints[0]] for moment in known]
    steps, epochs = [point.step for point in order], [point.epoch for point in order]
    in_order = {"step": None not in steps and steps == sorted(steps), "epoch": epochs == sorted(e or 0 for e in epochs)}
    if None not in steps:
        assert in_order["step"] or (rows and None not in epochs and in_order["epoch"])
    elif None not in epochs:
        assert in_order["epoch"]


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_shows_then_imports(made, tmp_path):
    root = tmp_path / "root"
    text = invoke("import", made[0], root, "--run", "r", "--dry-run")
    assert "e7.pth" in text
    assert "model_state_dict -> model" in text
    assert "5 checkpoints would be imported into run r; 5 reports in its history" in text
    assert not root.exists()
    found = json.loads(invoke("import", made[0], root, "--run", "r", "--json"))
    assert [one["epoch"] for one in found["checkpoints"]] == [0, 1, 2, 3, 4]
    assert "pinned: imported from e7.pth" in invoke("ls", root)
    assert "exists (epoch 2, step 6)" in invoke("explain", root, "r:epoch=2")
    assert "10 of" not in invoke("keep", root, "r", "--rules", "last:1", "--dry-run")
    text = invoke("import", made[0], root, "--run", "r", "--rules", "best:val_accuracy:max")
    assert "0 checkpoints imported" in text
    assert f"The import pins none: the rules decide what stays. To see it: peakpoint keep {root} r" in text
    assert "4 would" not in invoke("ls", root)


def test_the_command_says_what_was_there_and_what_it_has_not_looked_at(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "rng.npy").write_text("x")
    shutil.copy(folder / "e7.pth", folder / "z.pth")
    assert "not checkpoints: a/rng.npy, b/rng.npy\n" in invoke("import", folder, tmp_path / "root", "--run", "r")
    text = invoke("import", folder, tmp_path / "root", "--run", "r")
    assert "0 checkpoints imported into run r, 5 imported before, 1 duplicate; 5 reports" in text


def test_the_command_marks_steps_that_are_made_up_and_shows_metrics_that_tell(tmp_path):
    for epoch in range(2):
        state = {"model": Net().state_dict(), "epoch": epoch, "lr": 1.5, "wd": 2.5, "momentum": 3.5, "best_acc1": 4.5}
        torch.save(state, tmp_path / f"{epoch}.pth")
    text = invoke("import", tmp_path, tmp_path / "root", "--run", "r", "--dry-run")
    assert re.search(r"0\.pth +torch\.save +0 +\(1\) +4\.5", text)
    assert "(N): step guessed" in text
    found = json.loads(invoke("import", tmp_path, tmp_path / "root", "--run", "r", "--dry-run", "--json"))
    assert [one["step_counted"] for one in found["checkpoints"]] == [True, True]


def test_a_narrow_terminal_has_fewer_columns(made, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from peakpoint.cli.main import run; run()"]
    command += ["import", str(made[0]), str(tmp_path / "root"), "--run", "r", "--dry-run"]
    subprocess.run(command, stdout=theirs, check=True, env={**os.environ, "COLUMNS": "60", "TERM": "dumb"})
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    rows = [line for line in text.splitlines() if line.startswith("e")]
    assert len(rows) == 5, text
    assert all(row.rstrip().endswith("planned") for row in rows)
    assert "torch.save" not in text
    assert "val_accuracy" in text


def test_an_import_that_is_interrupted_says_what_came_in(made, tmp_path):
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "n = 0\n"
        "def hook(event, arguments):\n"
        "    global n\n"
        "    if event == 'open' and str(arguments[0]).endswith('e7.pth') and os.path.exists(sys.argv[3]):\n"
        "        n += 1\n"
        "        if n == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(hook)\n"
        "from peakpoint.cli.main import run; run()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "import", made[0], tmp_path / "root", "--run", "r"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    there = len(pp.open(tmp_path / "root").run("r").checkpoints())
    assert there == 2
    assert "2 checkpoints in run r, each complete; the same command imports the rest" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{made}", "--run", "größe läuft"], 2, "ASCII letters"),
        (["{made}/nothing", "--run", "r"], 10, "does not exist"),
        (["{made}", "--run", "r", "--part", "x"], 2, "FROM=TO"),
        (["{made}", "--run", "a b"], 2, "a b"),
        (["{made}", "--run", "r", "--metrics", "{made}/no.csv"], 10, "does not exist"),
        (["{made}", "--run", "r", "--rules", "bset:x"], 2, "bset"),
        (["{made}"], 2, "--run"),
    ],
)
def test_wrong_input_of_the_command(arguments, code, words, made, tmp_path):
    path, *rest = [argument.format(made=made[0]) for argument in arguments]
    done = in_process("import", path, tmp_path / "root", *rest)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# --- frameworks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_lightning_writes(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self, optim="adam", lr=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, _):
            loss = self.layer(batch[0]).square().mean()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, _):
            self.log("val_loss", self.layer(batch[0]).abs().mean())

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2)), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=3,
            logger=CSVLogger(tmp_path / "logs"),
            callbacks=[ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            log_every_n_steps=1,
        )
        trainer.fit(Module(), data, data)
    log = next((tmp_path / "logs").rglob("metrics.csv"))
    bring(tmp_path / "ckpt", tmp_path / "root", metrics=log)
    run = pp.open(tmp_path / "root").run("r")
    assert [(one.epoch, one.step) for one in run.checkpoints()] == [(0, 4), (1, 8), (2, 12)]
    assert {"val_loss", "train_loss_epoch", "best_val_loss"} <= run.latest().metrics.keys()
    assert len(run.history()) == 3
    model = Module()
    loaded = pp.load("r@latest", root=tmp_path / "root")
    model.load_state_dict(loaded["model"])
    assert loaded["extra"]["hyper_parameters"] == {"optim": "adam", "lr": 0.1}
    optimizer = torch.optim.Adam(model.parameters())
    state = {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}
    with (
        pytest.warns(pp.PeakpointWarning, match="random generators"),
        pp.Checkpointer(tmp_path / "root", run="r", state=state, keep=[pp.Last(1)], preempt=None) as ckpt,
    ):
        assert next(ckpt.epochs(9)) == 3


@pytest.mark.slow
def test_what_accelerate_writes(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, scheduler = accelerator.prepare(*objects())
    train_epoch(model, optimizer, scheduler, steps=3)
    accelerator.save_state(str(tmp_path / "state"))
    report = bring(tmp_path / "state", tmp_path / "root")
    assert report.others == ()
    [one] = pp.open(tmp_path / "root").run("r").checkpoints()
    assert one.step == 3
    loaded = pp.load("r@latest", root=tmp_path / "root")
    assert list(loaded) == ["model", "optimizer", "scheduler", "extra"]
    assert same(loaded["optimizer"]["state"], optimizer.state_dict()["state"])
    assert all(torch.equal(loaded["model"][name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.GPT2LMHeadModel(config)
        options = transformers.TrainingArguments(
            tmp_path / "out",
            num_train_epochs=2,
            per_device_train_batch_size=2,
            save_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        transformers.Trainer(model, options, train_dataset=rows).train()
    bring(tmp_path / "out", tmp_path / "root")
    run = pp.open(tmp_path / "root").run("r")
    assert [one.step for one in run.checkpoints()] == [3, 6, 8]
    assert [one.step for one in run.history()] == list(range(1, 9))
    assert "loss" in run.latest().metrics
    loaded = pp.load("r@latest", root=tmp_path / "root")
    assert {"model", "optimizer", "scheduler", "extra"} <= set(loaded)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded["model"].items())


RANK = """
import os, sys, warnings
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

warnings.simplefilter("ignore")
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35.0).reshape(5, 7)
sharded = {"rows": distribute_tensor(whole, mesh, [Shard(0)]), "columns": distribute_tensor(whole, mesh, [Shard(1)])}
dcp.save({"model": {**sharded, "same": torch.ones(3)}, "epoch": 4, "step": 50}, checkpoint_id=folder)
print("done", flush=True)
sys.stdin.read()  # until both are done: one that finds the other's connections closed aborts
os._exit(0)
"""


@pytest.mark.slow
def test_what_two_ranks_write_is_put_together(tmp_path):
    folder = tmp_path / "dcp"
    command, pipes = [sys.executable, "-c", RANK], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], **pipes) for rank in (0, 1)]
    assert [rank.stdout.readline() for rank in ranks] == [b"done\n", b"done\n"]
    assert [(rank.communicate(timeout=120)[0], rank.returncode) for rank in ranks] == [(b"", 0), (b"", 0)]
    bring(folder, tmp_path / "root")
    [one] = pp.open(tmp_path / "root").run("r").checkpoints()
    assert (one.epoch, one.step) == (4, 50)
    model = pp.load("r@latest", root=tmp_path / "root")["model"]
    whole = torch.arange(35.0).reshape(5, 7)
    assert torch.equal(model["rows"], whole)
    assert torch.equal(model["columns"], whole)
    next(folder.glob("__1_*.distcp")).unlink()
    with pytest.raises(pp.errors.CorruptError, match="which is not beside it"):
        bring(folder, tmp_path / "other")
