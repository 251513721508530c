"""What was found is loaded: by ref, by path, as a checkpoint; all of it, a part, into a model, on a device."""

import pytest
import torch

import peakpoint as pp
from peakpoint.store import MemoryStore
from training import checkpointer, same


def trained(root, keep=None, run="r"):
    """Two checkpoints, the first is the better; returns the model of the second."""
    keep = [pp.Best("val/acc", "max"), pp.Last(1)] if keep is None else keep
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with checkpointer(root, run=run, state={"model": model, "note": "text"}, keep=keep) as ckpt:
        for step, value in enumerate((0.9, 0.5), 1):
            ckpt.report({"val/acc": value, "b": value}, step=step)
            with torch.no_grad():
                model[0].weight += 1
    return model


@pytest.fixture
def root(tmp_path):
    trained(tmp_path / "a" / "runs")
    return tmp_path / "a" / "runs"


def test_every_way_to_name_a_checkpoint_loads_it(root, monkeypatch):
    best = pp.open(root).run("r").best()
    assert best.step == 1
    expected = pp.load("r:1", root=root)["model"]
    for named in (
        best,
        best.path,
        f"{best.path}/",
        f"{root}/r@best",
        f"{root}/r@best:val/acc",
        f"{root}/r/{best.name}",
        f"{root}/r:1",
        f"{root}/runs/r@best:val/acc:max",
        root / "r@best",
        pp.select(root, by={"val/acc": "max"}).first(),
    ):
        assert same(pp.load(named, part="model"), expected), named
    for directory, named in (
        (root.parent, "runs/r@best"),
        (root, "r@best"),
        (root / "runs" / "r" / "checkpoints", best.name),
        (best.path, "../../../../r@best"),
    ):
        monkeypatch.chdir(directory)
        assert same(pp.load(named, part="model"), expected), named
    assert pp.load(f"{root}/r@last")["note"] == "text"
    assert pp.load("r@last", root=root).manifest.step == pp.load("r@latest", root=root).manifest.step == 2


def test_a_run_that_is_called_runs_is_no_directory(tmp_path):
    trained(tmp_path, run="runs")
    [first, second] = pp.open(tmp_path).run("runs").checkpoints()
    for named in (f"{tmp_path}/runs/{first.name}", f"{tmp_path}/runs@best", f"{tmp_path}/runs/runs@best", first.path):
        assert pp.load(named).manifest.id == first.id
    assert pp.load(f"{tmp_path}/runs/{second.id[:8]}").manifest.id == second.id


def test_an_alias_behind_a_path_is_followed(root):
    from commands import command

    command("promote", root, "r@best", "--as", "r/champion", "--why", "x", "--force", "--yes")
    assert pp.load(f"{root}/@r/champion").manifest.step == 1


def test_a_checkpoint_loads_itself(root):
    best = pp.open(root).find("r@best")
    weights = best.load("model")
    assert weights["0.weight"].data_ptr() == weights["1.weight"].data_ptr(), "tied"
    assert best.load(part="note") == "text"
    assert list(best.load()) == ["model", "note"]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert best.load(into=model).restored[0].part == "model"
    assert same(dict(model.state_dict()), dict(weights))


def test_a_part_is_read_whole_before_rules_may_remove_the_checkpoint(root):
    best = pp.open(root).find("r@best")
    weights = best.load("model")
    assert not pp.open(root).store.is_read(f"runs/r/checkpoints/{best.name}/manifest.json")
    expected = weights["0.weight"].clone()
    for file in best.path.iterdir():
        file.unlink()
    assert same(weights["0.weight"], expected)


def test_tensors_are_put_on_a_device(root):
    best = pp.open(root).find("r@best")
    moved = best.load(device="meta")
    assert {value.device.type for value in moved["model"].values()} == {"meta"}
    assert moved.tensor("model", "1.bias").device.type == "meta"
    assert {value.device.type for _, value in moved.each("model")} == {"meta"}
    assert best.load("model", device=torch.device("cpu"))["1.bias"].device.type == "cpu"
    for wrong in ("cuda:99", "nowhere", 1.5):
        with pytest.raises(pp.errors.ConfigError, match="cannot be used here"):
            best.load("model", device=wrong)
    with pytest.raises(pp.errors.ConfigError, match="device= has no meaning"):
        best.load(into=torch.nn.Linear(2, 2), device="cpu")


@pytest.mark.parametrize(
    ("named", "kind", "words"),
    [
        ("nowhere/r@best", pp.errors.NotFoundError, "leads into no repository"),
        ("r@best\0", pp.errors.NotFoundError, "leads into no repository"),
        ("{root}", pp.errors.NotFoundError, "leads into no repository"),
        ("{root}/r", pp.errors.ConfigError, "names a run but no checkpoint"),
        ("{root}/r@best:val", pp.errors.NotFoundError, "did you mean 'val/acc'"),
        ("{root}/x@best", pp.errors.NotFoundError, "has no run 'x'"),
        ("{root}/runs/r/checkpoints/none/model.safetensors", pp.errors.ConfigError, "give the directory of one"),
        ("{root}/runs/r", pp.errors.ConfigError, "or a ref such as '.*/RUN@best'"),
        ("{root}/r", pp.errors.ConfigError, "write r@best or r@last"),
        ("{root}/runs/r/checkpoints/none", pp.errors.NotFoundError, "no checkpoint named 'none'"),
    ],
)
def test_what_leads_nowhere_is_said(root, named, kind, words):
    with pytest.raises(kind, match=words):
        pp.load(named.format(root=root))


def test_a_run_is_no_checkpoint(root):
    with pytest.raises(pp.errors.ConfigError, match=r"takes a Checkpoint, a ref or a path, not a .*Run"):
        pp.load(pp.open(root).run("r"))


def test_what_has_no_meaning_together_is_refused(root):
    with pytest.raises(pp.errors.ConfigError, match="part='note' has no meaning"):
        pp.load("r@best", root=root, part="note", into={"model": torch.nn.Linear(2, 2)})
    with pytest.raises(pp.errors.NotFoundError, match="no part 'ema'"):
        pp.load("r@best", root=root, part="ema")


def test_a_checkpoint_of_a_store_without_directories_needs_its_root():
    store = MemoryStore()
    trained(store)
    best = pp.open(store).run("r").best()
    with pytest.raises(pp.errors.ConfigError, match="give root="):
        best.load()
    assert pp.load(best, root=store, part="note") == "text"


def test_the_history_is_a_table_of_plain_rows(tmp_path):
    with checkpointer(tmp_path) as ckpt:
        ckpt.report({"acc": 0.5, "step": 7.0}, step=1, epoch=0)
        ckpt.report(acc=0.6, step=2)
    first, second = pp.open(tmp_path).run("r").table()
    assert list(first) == ["report", "at", "step", "epoch", "acc", "metric.step"]
    assert [first[name] for name in ("report", "step", "epoch", "acc", "metric.step")] == [1, 1, 0, 0.5, 7.0]
    assert (second["epoch"], "metric.step" in second, type(second)) == (None, False, dict)


# --- what the best of a run is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "step"),
    [
        ([pp.Last(2), pp.Best("val/acc", "min"), pp.Best("b", "max")], 2),
        ([pp.TopK("val/acc", "max", 2), pp.Last(2)], 1),
        ([pp.Last(2)], "no rule of this run ranks; give r@best:METRIC:max"),
        ([pp.Pareto({"val/acc": "max", "b": "min"}), pp.Last(2)], "ranks by several metrics; give r@best:val/acc"),
        ([pp.Best("val/acc", "max"), pp.Best("val/acc", "min"), pp.Last(2)], "rank it both ways"),
    ],
)
def test_the_first_rule_that_ranks_says_what_the_best_is(tmp_path, keep, step):
    trained(tmp_path, keep)
    run = pp.open(tmp_path).run("r")
    if isinstance(step, int):
        assert run.best().step == pp.open(tmp_path).find("r@best").step == step
    else:
        with pytest.raises(pp.errors.ConfigError, match=step) as caught:
            run.best()
        assert "\n" not in str(caught.value)


def test_a_direction_without_a_metric_is_refused(root):
    with pytest.raises(pp.errors.ConfigError, match="of which metric"):
        pp.open(root).run("r").best(mode="max")
