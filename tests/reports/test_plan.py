"""A plan beside what trainings really write, hold and keep."""

import itertools
import json
import math
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peakpoint as pp
from peakpoint import rules
from peakpoint.cli.demo.training import LeNet5, digits
from peakpoint.cli.main import cli
from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format.amounts import size_text
from peakpoint.format.events import Reported, Saved
from peakpoint.reports.plan import forecast as planner
from peakpoint.reports.plan import networks, optimizers, sizes
from peakpoint.reports.plan.curves import AssumedMetrics
from peakpoint.rules.simulate import what_if
from strategies import START, lasts, modes, paretos, thins, topks
from training import checkpointer

PARSED = rules.parse_all


def parts(found):
    return {part.name: part.bytes for part in found.parts if part.bytes}


# --- networks -----------------------------------------------------------------------------------------------------


def counts():
    """Parameters of each preset, counted layer by layer in another way."""

    def conv(out, into, kernel):
        return out * into * kernel**2 + 2 * out

    def basic(out, into):
        return conv(out, into, 3) + conv(out, out, 3) + (conv(out, into, 1) if out != into else 0)

    def neck(width, into):
        shortcut = conv(4 * width, into, 1) if into != 4 * width else 0
        return conv(width, into, 1) + conv(width, width, 3) + conv(4 * width, width, 1) + shortcut

    def gpt(d, layers, words, places):
        return (words + places) * d + layers * (12 * d**2 + 13 * d) + 2 * d

    small = conv(64, 3, 7) + 4 * conv(64, 64, 3) + 512 * 1000 + 1000
    small += sum(basic(2 * d, d) + basic(2 * d, 2 * d) for d in (64, 128, 256))
    large = conv(64, 3, 7) + neck(64, 64) + 2 * neck(64, 256) + 2048 * 1000 + 1000
    large += sum(neck(d, 2 * d) + (n - 1) * neck(d, 4 * d) for d, n in ((128, 4), (256, 6), (512, 3)))
    return {
        "lenet-5": 6 * 26 + 16 * 151 + 120 * 401 + 84 * 121 + 10 * 85,
        "resnet-18": small,
        "resnet-50": large,
        "gpt-2": gpt(768, 12, 50257, 1024),
        "gpt-3": gpt(12288, 96, 50257, 2048),
    }


def test_presets_have_the_parameters_of_their_architectures():
    known = {"lenet-5": 61_706, "resnet-18": 11_689_512, "resnet-50": 25_557_032, "gpt-2": 124_439_808}
    assert {name: networks.architecture(name).parameters for name in networks.NAMES} == counts()
    assert {**counts(), **known} == counts()
    assert counts()["gpt-3"] == 174_604_259_328
    assert networks.architecture("lenet-5").parameters == sum(p.numel() for p in LeNet5().parameters())


def test_the_weights_of_the_presets_are_of_the_known_sizes():
    megabytes = {
        name: parts(sizes.from_network(networks.architecture(name), optimizer="none"))["model"] / 1e6
        for name in networks.NAMES
    }
    near = {"lenet-5": 0.25, "resnet-18": 45, "resnet-50": 100, "gpt-2": 500, "gpt-3": 350_000}
    assert megabytes == pytest.approx(near, rel=0.05)


def test_what_an_optimizer_adds_to_the_weights():
    count = 10**9

    def grown(**options):
        found = sizes.from_count(count, **options)
        return found.bytes / parts(sizes.from_count(count, optimizer="none", dtype=options["dtype"]))["model"]

    assert grown(optimizer="adam", dtype="float32") == pytest.approx(3, rel=1e-4)
    assert grown(optimizer="sgd+momentum", dtype="float32") == pytest.approx(2, rel=1e-4)
    assert grown(optimizer="adamw", dtype="bfloat16", master="float32") == pytest.approx(7, rel=1e-4)


# --- optimizers ---------------------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """As far as its state goes."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-4})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adafactor": torch.optim.Adafactor,
    "rmsprop": torch.optim.RMSprop,
    "centered": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "lion": Lion,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_hold_what_was_foreseen(name, dtype, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 40)).to(dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    state = {"model": model, "optimizer": optimizer}
    foreseen = sizes.from_state(state)
    model(torch.randn(2, 3, 8, 8, dtype=dtype)).sum().backward()
    optimizer.step()
    held = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    guess = optimizers.optimizer_state(
        type(optimizer).__name__, [p.shape for p in model.parameters()], optimizer.param_groups[0]
    )
    bytes_held = sum(value.numel() * value.element_size() for value in held)
    assert guess.tensors + guess.scalars == len(held)
    assert guess.elements * dtype.itemsize + guess.scalars * optimizers.STEP == bytes_held
    assert parts(sizes.from_state(state)) == pytest.approx(parts(foreseen), abs=100)  # the same, and now it is there
    with checkpointer(tmp_path, state=state) as ckpt:
        ckpt.report(step=1)
    written = {file.name.partition(".")[0]: file.size for file in pp.open(tmp_path).run("r").manifests()[0].files}
    expected = {"state" if part == "rest" else part: size for part, size in parts(foreseen).items()}
    assert {part: size for part, size in expected.items() if part != "state"} == {
        part: size for part, size in written.items() if part != "state"
    }
    assert expected["state"] == pytest.approx(written["state"], rel=0.1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_holds_what_was_foreseen():
    model = nn.Linear(30, 40, bias=False)
    optimizer = torch.optim.Muon(model.parameters())
    foreseen = parts(sizes.from_state({"optimizer": optimizer}))
    model(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    assert parts(sizes.from_state({"optimizer": optimizer})) == foreseen


def test_tied_frozen_and_meta():
    one = nn.Linear(300, 300)
    two = nn.Linear(300, 300)
    two.weight = one.weight
    tied = parts(sizes.from_state({"model": nn.Sequential(one, two)}))["model"]
    assert tied == 4096 + 4 * (300 * 300 + 2 * 300)
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 10))
    head = torch.optim.AdamW(model[2].parameters())
    part = sizes.from_state({"model": model, "optimizer": head}).parts[0]
    assert part.frozen == 4096 + 4 * (300 * 300 + 3 * 300)
    assert part.bytes == part.frozen + 4096 + 4 * (10 * 300 + 10 + 2 * 300) + 8
    average = torch.optim.swa_utils.AveragedModel(model)  # no optimizer trains it, and it changes all the same
    assert sizes.from_state({"model": model, "ema": average, "optimizer": head}).parts[1].frozen == 0
    with torch.device("meta"):
        ghost = nn.Linear(50_000, 50_000)
    state = {"model": ghost, "optimizer": torch.optim.Adam(ghost.parameters())}
    assert sizes.from_state(state).bytes == pytest.approx(3 * 4 * 50_000 * 50_001, rel=1e-5)


# --- the run ------------------------------------------------------------------------------------------------------


def reported(curve, count):
    return [
        Reported(at=START, report=number, step=number, epoch=number - 1, metrics=values)
        for number, values in enumerate(itertools.islice(curve, count), 1)
    ]


playable = st.lists(
    lasts | topks | thins | paretos | st.builds(pp.Best, st.just("m"), modes, smooth=st.integers(1, 3)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(playable, st.integers(1, 12))
def test_a_plan_is_what_a_replay_of_such_reports_tells(keep, epochs):
    sized = sizes.from_count(1000, optimizer="adam")
    found = planner.forecast(sized, keep=keep, epochs=epochs, steps_per_epoch=1)
    for outlook in found.outlooks:
        curve = AssumedMetrics(keep, epochs, 1, {}, 0).metrics(outlook.name)
        told = what_if(reported(curve, epochs), keep, sized.bytes)
        assert (outlook.saves, outlook.kept, outlook.most) == (told.saves, len(told.kept), told.most)
        assert outlook.bytes_kept == told.bytes_kept
        assert outlook.bytes_written == told.bytes_written
        assert sum(outlook.gaps) == epochs


REAL = [
    "best:acc:max last:2",
    "best:acc:max:parts=model every:3ep:parts=model last:1",
    "topk:loss:min:3 budget:1MB",
    "best:acc:max:smooth=3 thin:2",
    "every:4ep:2",
    "best:acc:max:parts=model best:loss:min:parts=model last:1 budget:400kB",
]


END = ("the end of the training: the run continues from here",)  # beside what the rules keep


def grow(model, optimizer):
    model(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("text", REAL)
@pytest.mark.parametrize("name", ["always improves", "never improves"])
def test_a_plan_is_what_a_training_does(text, name, tmp_path):
    keep = PARSED(text)
    model = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    found = planner.forecast({"model": model, "optimizer": optimizer}, keep=keep, epochs=10)
    state = {"model": model, "optimizer": optimizer}
    sign = 1 if name == "always improves" else -1
    with checkpointer(tmp_path, state=state, keep=keep) as ckpt:
        for epoch in ckpt.epochs(10):
            grow(model, optimizer)
            ckpt.report(acc=sign * epoch, loss=-sign * epoch)
    run = pp.open(tmp_path).run("r")
    outlook = next(one for one in found.outlooks if one.name in {name, "any"})
    saved = [event for event in run.events() if isinstance(event, Saved) and event.reasons != END]
    manifests = [manifest for manifest in run.manifests() if manifest.reasons != END]
    assert outlook.saves == len(saved)
    assert outlook.kept == len(manifests)
    assert outlook.whole == sum("optimizer" in one.parts for one in manifests)
    assert outlook.bytes_kept == pytest.approx(sum(one.size_bytes for one in manifests), rel=0.01)
    assert outlook.bytes_written == pytest.approx(sum(event.size_bytes for event in saved), rel=0.01)


def test_a_frozen_backbone_is_written_once(tmp_path):
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 10))
    optimizer = torch.optim.AdamW(model[1].parameters())
    state = {"model": model, "optimizer": optimizer}
    found = planner.forecast(state, keep=[pp.Last(4)], epochs=6)
    with checkpointer(tmp_path, state=state, keep=[pp.Last(4)]) as ckpt:
        for _ in ckpt.epochs(6):
            model(torch.randn(2, 300)).sum().backward()
            optimizer.step()
            ckpt.report()
    files = [path.stat() for path in (tmp_path / "runs" / "r" / "checkpoints").rglob("*.*") if path.is_file()]
    on_disk = {stat.st_ino: stat.st_size for stat in files}
    manifests = sum(path.stat().st_size for path in tmp_path.rglob("manifest.json"))
    assert found.likely.bytes_kept == pytest.approx(sum(on_disk.values()) - manifests, rel=0.02)
    assert found.likely.bytes_written < 2 * found.sizes.parts[0].frozen + 6 * 60_000


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    """LeNet-5 on digits with AdamW, and what was foreseen before its first step."""
    root = tmp_path_factory.mktemp("lenet")
    torch.manual_seed(3)
    images, labels = digits()
    model = LeNet5()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    state = {"model": model, "optimizer": optimizer}
    keep = PARSED("best:val_accuracy:max every:10ep last:3")
    found = pp.forecast(state, keep=keep, epochs=25)
    with checkpointer(root, run="lenet", state=state, keep=keep) as ckpt:
        for _ in ckpt.epochs(25):
            for batch in torch.randperm(1347)[:88].split(8):  # what it learns does not matter here
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                right = model(images[-20:]).argmax(1) == labels[-20:]
            ckpt.report(val_accuracy=right.float().mean())
    return root, found


@pytest.mark.slow
def test_a_short_training_writes_what_was_foreseen(lenet):
    root, found = lenet
    run = pp.open(root).run("lenet")
    saved = [event for event in run.events() if isinstance(event, Saved)]
    assert found.likely.saves == len(saved) == 25
    assert found.likely.bytes_written == pytest.approx(sum(event.size_bytes for event in saved), rel=0.005)
    low, high = found.span("kept")
    assert low <= len(run.manifests()) <= high
    assert found.sizes.bytes == pytest.approx(run.manifests()[-1].size_bytes, rel=0.005)
    known = planner.forecast(
        sizes.from_network(networks.architecture("lenet-5")), keep=[pp.Last(1)], epochs=25
    )  # from the preset alone
    assert known.likely.bytes_written == pytest.approx(sum(event.size_bytes for event in saved), rel=0.005)


def test_a_plan_from_a_run_that_exists(lenet):
    root, _ = lenet
    manifests = pp.open(root).run("lenet").manifests()
    found = sizes.from_manifests(manifests, "lenet")
    assert found.bytes == manifests[-1].size_bytes
    assert found.stall == pytest.approx(
        sum(one.timing[name] for one in manifests for name in ("capture_seconds", "step_waited_seconds"))
        / len(manifests)
    )
    assert found.durable > found.stall
    measured = planner.pace(pp.open(root).run("lenet").history())
    assert (measured.epochs, measured.reports_per_epoch, measured.steps) == (25, 1, 11)
    with pytest.raises(NotFoundError, match="no checkpoints yet"):
        sizes.from_manifests([], "lenet")


def test_what_is_shared_in_a_run_is_known(tmp_path):
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 10))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for _ in ckpt.epochs(3):
            model(torch.randn(2, 300)).sum().backward()
            optimizer.step()
            ckpt.report()
    part = sizes.from_manifests(pp.open(tmp_path).run("r").manifests(), "r").parts[0]
    assert part.frozen == 4096 + 4 * 300 * 301


def test_more_is_written_in_the_worst_case_than_in_the_best():
    sized = sizes.from_count(10**6, optimizer="adam")
    found = planner.forecast(sized, keep=PARSED("best:acc:max"), epochs=100)
    assert found.span("saves") == (1, 100)
    assert 1 < found.likely.saves < 100
    assert found.likely.gaps[-1] > 20  # nothing is better after the peak
    pareto = planner.forecast(sized, keep=PARSED("pareto:acc:max:sparsity:max"), epochs=20)
    assert pareto.span("kept") == (1, 20)


def test_sparsity_follows_its_schedule():
    sized = sizes.from_count(10**6, optimizer="adam")
    keep = PARSED("best-at:acc:max:sparsity:0.5,0.9:0.01")
    found = planner.forecast(sized, keep=keep, epochs=100, sparsity={0: 0.0, 50: 0.5, 60: 0.5, 70: 0.9})
    # at 0.5 from epoch 49 to 60, at 0.9 from epoch 70 on
    assert found.span("saves") == (2, 12 + 30)
    assert found.span("kept") == (2, 2)


@pytest.mark.parametrize("schedule", [{0: 0.0, 10: 0.9}, {0: 0.0, 5: 0.5, 10: 0.5, 12: 0.9}, {0: 0.9, 10: 0.5}])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_everything_is_on_the_front_when_metrics_are_traded_against_a_schedule(schedule, mode):
    sized = sizes.from_count(10**6, optimizer="adam")
    keep = pp.rules.pruning("loss", mode, (0.5, 0.9))
    found = planner.forecast(sized, keep=keep, epochs=20, reports_per_epoch=2, sparsity=schedule)
    traded = found.outlooks[-1]
    assert (traded.name, traded.kept) == ("trades off", 40)


def test_a_schedule_stays_at_its_targets_when_metrics_are_traded():
    keep = [at := pp.BestAtSparsity("a", "max", (0.9,), 0.0), pp.Pareto({"a": "max", "sparsity": "max"})]
    *_, last = AssumedMetrics(keep, planner.MOST_WITH_PARETO, 1, {0: 0.9}, 0).metrics("trades off")
    assert at.target_of(SimpleNamespace(metrics=last)) == 0.9


def test_the_time_of_a_save_is_no_work():
    at, still = START, [0.0, 0.03, 0.05, 0.04]
    reports = []
    for number, waited in enumerate([*still, 0.0], 1):
        reports.append(Reported(at=at, report=number, step=number, epoch=number - 1, metrics={}))
        at += timedelta(seconds=0.002 + waited)
    timed = [({"waited_seconds": one / 2, "capture_seconds": one / 2}, number) for number, one in enumerate(still, 1)]
    manifests = [SimpleNamespace(report=number, timing=timing) for timing, number in timed]
    assert planner.pace(reports, manifests[1:], {2, 3, 4}).seconds == pytest.approx(0.002)
    assert planner.pace(reports, [manifests[3]], {2, 4}).seconds == pytest.approx(0.002)
    assert planner.pace(reports).seconds == pytest.approx(0.037)
    assert planner.pace(reports[:2], [SimpleNamespace(report=1, timing={"capture_seconds": 9})], {1}).seconds == 0


def test_rules_by_time_and_by_steps():
    sized = sizes.from_count(10**6, optimizer="adam")
    keep = PARSED("every:60min every:1000st")
    found = planner.forecast(sized, keep=keep, epochs=36, steps_per_epoch=100, epoch_time=timedelta(minutes=5))
    assert found.likely.name == "any"
    # three hours and the report at the end of the third, with which the fourth begins
    assert dict(found.likely.claims) == {"every:60min": 4, "every:1000st": 3}
    inside = planner.forecast(sized, keep=PARSED("every:1ep last:1"), epochs=3, reports_per_epoch=4)
    assert (inside.reports, inside.likely.saves, inside.likely.kept) == (12, 12, 4)


def test_rules_without_effect_are_named():
    sized = sizes.from_count(10**6, optimizer="adam")
    assert planner.forecast(sized, keep=PARSED("every:200ep last:1"), epochs=100).idle == ("every:200ep",)


SIZED = sizes.from_count(10**6, optimizer="adam")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, "epochs=-1 must be a whole number"),
        ({"epochs": 30_000}, "more than the 20000"),
        ({"keep": []}, "no rules"),
        ({"keep": PARSED("every:60min")}, "say how long an epoch takes"),
        ({"keep": PARSED("every:10st")}, "counts steps"),
        ({"keep": PARSED("best:a:max:warmup=5")}, "counts steps"),
        ({"keep": PARSED("best-at:a:max:density:0.5:0.1")}, "looks at 'density'"),
        ({"keep": PARSED("last:1:parts=modle")}, "did you mean 'model'"),
        ({"epoch_time": timedelta(0)}, "epoch_time"),
        ({"sparsity": {-1: 0.5}}, "must be an epoch"),
        ({"sparsity": {1: 1.5}}, "must be an epoch"),
        ({"reports_per_epoch": 0}, "reports_per_epoch=0"),
    ],
)
def test_what_cannot_be_planned(changes, message):
    with pytest.raises(ConfigError, match=message):
        planner.forecast(SIZED, **{"keep": PARSED("last:1"), "epochs": 10, **changes})


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        sizes.from_count(1, optimizer="adamww")
    with pytest.raises(ConfigError, match="depends on the shapes"):
        sizes.from_count(1, optimizer="Adafactor")
    with pytest.raises(ConfigError, match="dtype 'float23'"):
        sizes.from_count(1, optimizer="adam", dtype="float23")
    with pytest.raises(ConfigError, match="there is no preset 'resnet50'; did you mean 'resnet-50'"):
        networks.architecture("resnet50")
    with pytest.raises(ConfigError, match="takes a mapping of parts"):
        sizes.from_state(nn.Linear(1, 1))


def test_the_archive_ratio_is_the_one_that_was_measured():
    records = json.loads((Path(__file__).parents[2] / "benchmarks" / "results.json").read_text())["archive"]
    measured = {one["kind"]: one["sides"]["peakpoint archive"]["size"] / one["bytes"] for one in records}
    for kind, ratio in planner.ARCHIVE_RATIO.items():
        assert ratio == pytest.approx(measured[kind], abs=0.005)


# --- the command --------------------------------------------------------------------------------------------------

PLAN = ["--params", "25.6M", "--optimizer", "adamw", "--epochs", "100"]


def invoke(*words):
    return CliRunner().invoke(cli, ["plan", *map(str, words)], catch_exceptions=False)


def as_json(*words):
    return json.loads(invoke(*words, "--json").output)


def test_the_command_plans_from_numbers():
    told = as_json(*PLAN, "--rules", "best:val_accuracy:max every:10ep last:3", "--bandwidth", "1Gbit/s")
    assert told["checkpoint_bytes"] == pytest.approx(3 * 4 * 25_600_000, rel=1e-3)
    assert [one["kept"] for one in told["outlooks"]] == [13, 13, 12]
    assert told["naive_bytes"] == 100 * told["checkpoint_bytes"]
    assert told["costs"]["upload_checkpoint_seconds"] == pytest.approx(told["checkpoint_bytes"] / 125e6)
    assert told["costs"]["archive_ratio"] == 0.76
    assert told["interval"] is None
    text = invoke(*PLAN, "--rules", "last:3 every:500ep").output
    assert "307.2 MB" in text
    assert "every epoch, whole" in text
    assert "every:500ep keeps nothing" in text


def test_metrics_that_are_called_like_pictures_are_printed_as_they_are():
    assert "under best:fire:max last:1\n" in invoke(*PLAN, "--rules", "best:fire:max last:1").output


def test_the_command_says_how_often_to_save():
    words = ["--mtbf", "8h", "--stall", "10s", "--restart", "2min", "--epoch-time", "1h"]
    told = as_json(*PLAN, "--rules", "last:3", *words)["interval"]
    assert told["young_seconds"] == pytest.approx(math.sqrt(2 * 10 * 8 * 3600))
    assert told["best_seconds"] == told["daly_seconds"] < told["young_seconds"]
    assert 0 < told["best_overhead"] < told["rules_overhead"]
    assert told["rules_wait"] is False
    fast = [*words[:-1], "5s", "--durable", "18s"]
    assert "save faster than saves become durable" in invoke(*PLAN, "--rules", "last:3", *fast).output
    assert "save faster than saves become durable" not in invoke(*PLAN, "--rules", "every:2ep", *fast).output
    assert "the best interval is 12.5 min" in invoke(*PLAN, "--rules", "last:3", *words).output


def test_the_command_plans_from_a_run(lenet):
    root, _ = lenet
    told = as_json(root, "lenet", "--epochs", 50, "--mtbf", "8h")
    assert told["rules"] == ["best:val_accuracy:max", "every:10ep", "last:3"]
    assert (told["epochs"], told["outlooks"][0]["saves"]) == (50, 50)
    assert told["interval"]["stall_seconds"] > 0
    assert told["interval"]["rules_overhead"] > 0
    assert told["interval"]["durable_seconds"] > told["interval"]["stall_seconds"]
    whole = planner.pace(pp.open(root).run("lenet").history()).seconds
    assert told["epoch_seconds"] < whole
    assert as_json(root, "lenet")["epochs"] == 25
    with pytest.raises(ConfigError, match=r"'val_acc', which run 'lenet' has never reported; did you mean 'val_accur"):
        invoke(root, "lenet", "--rules", "best:val_acc:max")
    with pytest.raises(ConfigError, match="--optimizer has no meaning"):
        invoke(root, "lenet", "--optimizer", "adam")


def test_the_sparsity_of_a_run_is_the_one_that_it_reported(tmp_path):
    keep = PARSED("best-at:acc:max:density:0.5,0.9:0.01 last:1")
    with checkpointer(tmp_path, state={"x": torch.zeros(9), "n": 1}, keep=keep) as ckpt:
        for epoch in ckpt.epochs(10):
            ckpt.report(acc=epoch, density=(0.0, 0.5, 0.9)[min(epoch // 4, 2)])
    told = as_json(tmp_path, "r", "--rules", "best-at:acc:max:density:0.5,0.9:0.01", "--epochs", 20)
    assert [one["saves"] for one in told["outlooks"] if one["name"] == "always improves"] == [4 + 12]
    assert as_json(tmp_path, "r", "--rules", "last:2:parts=n")["outlooks"][0]["kept"] == 2


def test_nothing_that_is_kept_takes_no_archive():
    words = ["--params", "1e6", "--optimizer", "adamw", "--epochs", "3", "--rules", "every:5ep"]
    assert as_json(*words)["checkpoint_bytes"] == pytest.approx(12e6, rel=0.01)
    text = invoke(*words, "--bandwidth", "1Gbit/s").output
    assert "\nnothing is kept at the end\n" in text
    assert "0 B, " not in text


@pytest.mark.parametrize("command", ["keep", "plan"])
@pytest.mark.parametrize("width", [80, 120])
def test_the_help_has_every_form_of_a_rule_on_a_line(command, width):
    lines = CliRunner().invoke(cli, [command, "--help"], terminal_width=width).output.splitlines()
    forms = rules.FORMS.partition(";")[0].split()
    assert [line.strip() for line in lines if line.strip() in forms] == forms


def test_the_command_lists_the_presets():
    rows = as_json("--presets")["presets"]
    assert [row["name"] for row in rows] == list(networks.NAMES)
    assert rows[0]["adam_bytes"] < 1e6
    assert "174,604,259,328" in invoke("--presets").output
    for name in networks.NAMES:
        assert as_json("--preset", name, "--epochs", 3, "--rules", "last:1")["outlooks"][0]["kept"] == 1


def test_the_page_has_the_figures_of_the_presets():
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    rows = as_json("--presets")["presets"]
    for row in rows:
        title = row["title"] + (", 16 bits" if row["dtype"] == "float16" else "")
        figures = [size_text(row[f"{kind}_bytes"]) for kind in ("weights", "adam")]
        assert f"| {title} | {row['parameters']:,} | {figures[0]} | {figures[1]} |" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one thing to plan"),
        (["runs"], "name one thing to plan"),
        ([*PLAN, "--preset", "gpt-2"], "name one thing to plan"),
        (["--params", "abc"], "--params abc is not a number"),
        (["--params", "10M", "--epochs", "3", "--rules", "last:1"], "what the optimizer holds"),
        (PLAN, "needs --epochs and --rules"),
        (["--preset", "lenet5"], "there is no preset 'lenet5'; did you mean 'lenet-5'"),
        ([*PLAN, "--rules", "newest:3"], "not a rule"),
        ([*PLAN, "--rules", "last:1", "--bandwidth", "fast"], "is not a rate"),
        ([*PLAN, "--rules", "last:1", "--sparsity", "half"], "is not a schedule"),
        ([*PLAN, "--rules", "last:1", "--mtbf", "8h"], "give --stall"),
        ([*PLAN, "--rules", "last:1", "--mtbf", "0", "--stall", "1s"], "mean time between failures"),
    ],
)
def test_command_lines_that_cannot_be(words, message):
    with pytest.raises(ConfigError, match=message):
        invoke(*words)


def test_the_command_needs_no_torch():
    code = (
        "import sys; from peakpoint.cli.main import cli; "
        "cli.main(['plan', '--preset', 'gpt-2', '--epochs', '9', '--rules', 'last:1'], standalone_mode=False); "
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
