"""What ``evaluate`` finds, on repositories that trainings have written."""

import itertools
import math
import random
import shutil
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.utils import prune

import peakpoint as pp
from peakpoint.format.events import Reported
from peakpoint.reports import evaluation
from peakpoint.reports.evaluation import evaluate
from peakpoint.reports.evaluation.groups import optimizer_of
from peakpoint.reports.evaluation.noise import margin_of_best, of_proportion, welch
from peakpoint.reports.evaluation.peaks import Examples, run_peaks
from peakpoint.reports.evaluation.sparsity import tradeoff
from peakpoint.reports.evaluation.tables import PEAKS, tables
from peakpoint.repository import maintenance
from peakpoint.rules.peaks import peaks
from training import QuietCheckpointer, checkpointer

pytestmark = pytest.mark.filterwarnings("ignore:.*never counts as best:peakpoint.PeakpointWarning")


def write(root, run, *, keep=None, state=None, resume="auto", start=0, **curves):
    """One report for each value of the curves, in epochs; None leaves a metric out."""
    rules = [pp.Best("acc", "max")] if keep is None else keep
    with checkpointer(root, run=run, state={"x": 1} if state is None else state, keep=rules, resume=resume) as ckpt:
        ckpt.resume()
        for epoch, values in enumerate(itertools.zip_longest(*curves.values()), start):
            metrics = {name: value for name, value in zip(curves, values, strict=True) if value is not None}
            ckpt.report(metrics, epoch=epoch, step=epoch)


def noisy(count, level=0.7, drop=0.0, seed=0, noise=0.004):
    """A curve that is level, and falls in its second half."""
    chance = random.Random(seed)
    return [level - drop * max(0, at / count - 0.5) * 2 + chance.gauss(0, noise) for at in range(count)]


def found(root, *runs, **options):
    return evaluate(pp.open(root), runs, **options)


def verdict(root, run, **options):
    [one] = found(root, run, **options).peaks
    return one.verdict


# --- peaks --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1.0])), max_size=30),
    st.sampled_from(["max", "min"]),
)
@example([0.0, -math.inf], "min")
@example([0.0, math.inf], "max")
def test_peaks_are_those_of_brute_force(values, mode):
    at = datetime(2026, 1, 1, tzinfo=UTC)
    history = [
        Reported(at=at, report=number, step=number * 10, epoch=None, metrics={} if value is None else {"m": value})
        for number, value in enumerate(values, 1)
    ]
    given = [(number, value) for number, value in enumerate(values, 1) if value is not None]
    real = [(number, value) for number, value in given if math.isfinite(value)]
    found = peaks(history, [("m", mode)])
    if not real:
        assert found == []
        return
    [peak] = found
    best = (max if mode == "max" else min)(value for _, value in real)
    first = next(number for number, value in real if value == best)
    assert (peak.best, peak.best_report, peak.best_step) == (best, first, first * 10)
    assert peak.last_report == given[-1][0]
    assert (peak.count, peak.missing) == (len(real), len(given) - len(real))
    assert not peak.lost < 0


@pytest.mark.parametrize(
    ("curve", "options", "expected"),
    [
        (noisy(40, drop=0.1), {}, "peak"),
        (noisy(40), {}, "within noise"),
        (noisy(40, drop=0.1), {"n_eval": 100}, "within noise"),
        (noisy(40, drop=0.1), {"n_eval": 10**6}, "peak"),
        ([0.1, 0.2, 0.3], {}, "still improving"),
        ([0.5], {}, "one value"),
        ([0.5, 0.7, 0.6], {}, "noise unknown"),
        ([0.5, 0.7, 0.6], {"n_eval": 10_000}, "peak"),
        ([0.5, 0.7, math.nan], {"n_eval": 10_000}, "not finite"),
        ([0.5, 0.7, 0.7], {}, "within noise"),
        ([0.7] * 3, {"n_eval": 10}, "within noise"),
        ([50, 70, 60], {"n_eval": 10_000, "percent": True}, "peak"),
        ([1.0, 1.0, 0.998], {"n_eval": 1000}, "within noise"),
    ],
)
def test_the_verdict_depends_on_the_noise(tmp_path, curve, options, expected):
    write(tmp_path, "r", acc=curve)
    assert verdict(tmp_path, "r", **options) == expected


@given(
    st.sampled_from([100, 1000, 10_000]),
    st.lists(st.floats(0, 1), max_size=40),
    st.floats(0, 1),
    st.lists(st.integers(0, 1), min_size=6, max_size=40),
    st.sampled_from(["max", "min"]),
)
def test_what_is_rounded_and_anneals_to_a_constant_is_never_a_peak(examples, early, level, tail, mode):
    early = early[: 3 * len(tail)]  # the constant is a quarter at least
    counts = [*(round(value * examples) for value in early), *(round(level * examples) + more for more in tail)]
    at = datetime(2026, 1, 1, tzinfo=UTC)
    history = tuple(
        Reported(at=at, report=number, step=number, epoch=None, metrics={"m": count / examples})
        for number, count in enumerate(counts, 1)
    )
    run = SimpleNamespace(
        name="r", history=history, rules=(), kept={}, saved=frozenset(), damaged=(), checkpoints=(),
        series=lambda metric: [report.metrics[metric] for report in history], best_checkpoint=lambda metric, mode: None,
    )  # fmt: skip
    [one] = run_peaks(run, "m", mode, Examples())
    assert one.verdict != "peak"
    assert one.noise is None


def annealed(level=0.706):
    """Forty epochs with a learning rate that decays, on 1000 examples."""
    chance = random.Random(3)
    first = [round(1000 * (level - 0.3 * math.exp(-at / 4) + chance.gauss(0, 0.004))) / 1000 for at in range(20)]
    return [*first[:-1], level + 0.002, *[level] * 20]


def test_the_noise_of_a_curve_that_anneals_is_not_known(tmp_path):
    write(tmp_path, "r", acc=annealed(), loss=[1 - acc + at * 1e-9 for at, acc in enumerate(annealed())])
    write(tmp_path, "q", acc=annealed(0.71))
    for one in found(tmp_path, "r", metrics={"acc": "max", "loss": "min"}).peaks:
        assert (one.verdict, one.noise, one.margin) == ("noise unknown", None, None)
        assert "hardly vary" in one.why
        assert "--n-eval" in one.why
    assert verdict(tmp_path, "r", n_eval=1000) == "within noise"
    [both] = found(tmp_path, compare=[("r", "q")], part="x").comparisons
    assert [item.interval for item in both.differences] == [None]


def test_a_reported_standard_error_of_nothing_is_none(tmp_path):
    write(tmp_path, "r", acc=[0.5, 0.7, 0.6], acc_se=[0, 0, 0])
    assert verdict(tmp_path, "r") == "noise unknown"


def test_the_numbers_behind_a_verdict(tmp_path):
    write(tmp_path, "r", acc=[0.5, 0.72, 0.70, 0.66], loss=[1.0, 0.5, 0.4, 0.6], keep=[pp.Best("acc", "max")])
    [one] = found(tmp_path, "r", n_eval=10_000).peaks
    assert one.noise.se == pytest.approx(of_proportion(0.69, 10_000))
    assert one.margin == pytest.approx(margin_of_best(4) * one.noise.se)
    assert one.points == pytest.approx(6)
    assert one.contenders == sum(abs(value - 0.72) <= one.margin for value in (0.5, 0.72, 0.70, 0.66))
    [loss] = found(tmp_path, "r", metrics={"loss": "min"}, n_eval=10_000).peaks
    assert (loss.peak.best, loss.peak.best_epoch, loss.noise, loss.points) == (0.4, 2, None, None)
    [error] = found(tmp_path, "r", metrics={"loss": "min"}, n_eval={"loss": 10_000}).peaks
    assert error.points == pytest.approx(20)


def test_percentages_are_never_guessed(tmp_path):
    write(tmp_path, "r", acc=[50, 72, 70])
    with pytest.raises(pp.errors.ConfigError, match="--percent"):
        found(tmp_path, n_eval=100)
    [one] = found(tmp_path, n_eval=10_000, percent=True).peaks
    assert one.noise.se == pytest.approx(100 * of_proportion(0.71, 10_000))
    assert one.points == pytest.approx(2)


def test_fractions_that_are_called_percentages_are_doubted(tmp_path):
    write(tmp_path, "fractions", acc=[0.5, 0.72, 0.70])
    write(tmp_path, "percent", acc=[0.9, 72, 70])
    doubts = [text for text in found(tmp_path, n_eval=1000, percent=True).remarks if "--percent" in text]
    assert len(doubts) == 1
    assert doubts[0].startswith("fractions: acc is never above 1")
    beside = found(tmp_path, "percent", n_eval=1000, percent=True, compare=[("fractions", "percent")], part="x")
    assert [text for text in beside.remarks if "--percent" in text] == doubts


def test_a_reported_standard_error_counts_before_the_scatter(tmp_path):
    write(tmp_path, "r", acc=noisy(40, drop=0.1), acc_se=[0.3] * 38 + [0.5, 0.5])
    [one] = found(tmp_path).peaks
    assert one.verdict == "within noise"
    assert one.noise.source == "reported as acc_se"
    assert 0.3 <= one.noise.se <= 0.5
    assert "the best is better on these examples" in one.aside


def test_an_unlucky_last_report_is_told_from_a_decline(tmp_path):
    wobbling = [*noisy(39, noise=0.03), 0.6]
    write(tmp_path, "wobbling", acc=wobbling)
    write(tmp_path, "declining", acc=noisy(40, drop=0.2))
    declining, unlucky = found(tmp_path, n_eval=100_000).peaks
    assert declining.verdict == unlucky.verdict == "peak"
    assert declining.aside == ""
    assert "unlucky moment" in unlucky.aside


def test_smoothed_peaks_stand_beside(tmp_path):
    curve = noisy(40, drop=0.1)
    curve[30] = 0.9
    write(tmp_path, "r", acc=curve, keep=[pp.Best("acc", "max", smooth=4), pp.Last(1)])
    raw, smooth = found(tmp_path).peaks
    means = [sum(curve[at - 3 : at + 1]) / 4 for at in range(3, 40)]
    assert (raw.window, raw.peak.best_epoch) == (1, 30)
    assert (smooth.window, smooth.peak.count) == (4, 37)
    assert smooth.peak.best == pytest.approx(max(means))
    assert smooth.peak.best_epoch == 3 + means.index(max(means))
    assert smooth.noise.se == pytest.approx(raw.noise.se / 2)


def test_it_is_said_what_became_of_the_best_checkpoint(tmp_path):
    write(tmp_path, "kept", acc=[0.5, 0.7, 0.6])
    write(tmp_path, "removed", acc=[0.5, 0.7, 0.6], keep=[pp.Last(1)])
    write(tmp_path, "unsaved", acc=[0.5, 0.7, 0.6], keep=[pp.Every(epochs=3)])
    kept, removed, unsaved = found(tmp_path, metrics={"acc": "max"}).peaks
    [checkpoint] = pp.open(tmp_path).run("kept").checkpoints()
    assert (kept.saved, kept.checkpoint) == (True, checkpoint.ref)
    assert (removed.saved, removed.checkpoint) == (True, None)
    assert removed.nearest[1] == 0.6
    assert (unsaved.saved, unsaved.checkpoint, unsaved.nearest[1]) == (False, None, 0.6)


def test_abandoned_branches_do_not_count(tmp_path):
    write(tmp_path, "r", acc=[0.5, 0.6, 0.9, 0.4], keep=[pp.Last(4)])
    write(tmp_path, "r", acc=[0.7, 0.65], keep=[pp.Last(4)], resume="r:epoch=1", start=2)
    report = found(tmp_path, metrics={"acc": "max"})
    [one] = report.peaks
    [material] = report.runs
    assert [r.metrics["acc"] for r in material.history] == [0.5, 0.6, 0.7, 0.65]
    assert [[r.metrics["acc"] for r in branch] for branch in material.abandoned] == [[0.9, 0.4]]
    assert (one.peak.best, one.peak.best_epoch) == (0.7, 2)
    assert pp.open(tmp_path).find(one.checkpoint).metrics["acc"] == 0.7
    assert "2 reports of abandoned branches" in " ".join(report.remarks)


def test_checkpoints_of_abandoned_branches_are_not_those_of_the_history(tmp_path):
    write(tmp_path, "r", acc=[0.5, 0.6, 0.9, 0.95], keep=[pp.Last(4)])
    write(tmp_path, "r", acc=[0.1, 0.2], keep=[pp.TopK("acc", "max", 4)], resume="r:epoch=1", start=2)
    report = found(tmp_path)
    [material] = report.runs
    assert set(material.kept) == material.saved == {1, 2}
    assert [row[-1] is not None for row in material.rows()] == [True, True, False, False]
    assert report.peaks[0].checkpoint == pp.open(tmp_path).find("r:epoch=1").ref


def test_what_was_measured_later_counts(tmp_path):
    write(tmp_path, "r", acc=[0.5, 0.6, 0.7], keep=[pp.Last(3), pp.Best("test", "max", pending=3)])
    run = pp.open(tmp_path).run("r")
    for epoch, value in enumerate([0.3, 0.4, 0.2]):
        run.record(f"r:epoch={epoch}", {"test": value})
    [one] = found(tmp_path).peaks
    assert (one.peak.metric, one.peak.best_epoch, one.peak.lost) == ("test", 1, 0.2)
    assert one.checkpoint == run.find("r:epoch=1").ref


def test_a_process_that_died_before_it_could_say_that_it_saved(tmp_path):
    write(tmp_path, "r", acc=[0.5, 0.7, 0.6])
    [segment] = (tmp_path / "runs" / "r" / "journal").iterdir()
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(line for line in lines if b'"saved"' not in line and b'"removed"' not in line))
    [one] = found(tmp_path).peaks
    assert one.checkpoint == pp.open(tmp_path).find("r@latest").ref


def test_a_flipped_bit_in_the_journal_is_said(tmp_path):
    write(tmp_path, "r", acc=[0.5, 0.7, 0.6])
    [segment] = (tmp_path / "runs" / "r" / "journal").iterdir()
    segment.write_bytes(segment.read_bytes().replace(b"0.7", b"0.8", 1))
    report = found(tmp_path)
    assert report.peaks[0].peak.best == 0.6
    assert any("damaged" in remark for remark in report.remarks)


def test_results_come_first_and_the_best_run_before_the_others(tmp_path):
    keep = [pp.Best("acc", "max", smooth=2), pp.Best("loss", "min")]
    for number in range(25):
        write(tmp_path, f"r{number:02}", keep=keep, acc=[0.001, 0.01 + number / 100, 0.005], loss=[number, 0.5, 1])
    first, *_, last = tables(found(tmp_path))
    assert (first.title, last.title) == (PEAKS, "Runs")
    shown, folded = first.parts
    assert list(dict.fromkeys(row[0] for row in shown)) == ["r24", *(f"r{number:02}" for number in range(23, 4, -1))]
    assert (len(shown), len(folded)) == (60, 15), "the rows of a run stay together"
    assert [row[1] for row in shown[:3]] == ["acc max", "acc (mean of 2) max", "loss min"]
    assert list(map(len, last.parts)) == [20, 5]


# --- groups -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    root = tmp_path_factory.mktemp("seeds")
    for kind, level in (("SGD", 0.72), ("AdamW", 0.69)):
        for seed in range(3):
            model = torch.nn.Linear(2, 1)
            state = {"model": model, "optimizer": getattr(torch.optim, kind)(model.parameters(), lr=0.1)}
            state["scheduler"] = torch.optim.lr_scheduler.StepLR(state["optimizer"], 1)
            curve = noisy(6, level, drop=0.05, seed=seed)
            write(
                root, f"net-{kind.lower()}-seed{seed}", acc=curve, state=state, keep=[pp.Best("acc", "max"), pp.Last(1)]
            )
    return root


def test_runs_are_compared_by_the_class_of_their_optimizer(seeds):
    report = found(seeds)
    [grouping] = report.groups
    first, second = grouping.groups
    best = {one.run: one.peak.best for one in report.peaks}
    mine = [[best[run] for run in group.runs] for group in grouping.groups]
    assert (first.name, second.name) == ("SGD", "AdamW")
    assert [len(group.runs) for group in grouping.groups] == [3, 3]
    assert first.best == pytest.approx(np.mean(mine[0]))
    assert first.best_spread == pytest.approx(np.std(mine[0], ddof=1))
    assert first.best_of_all == max(mine[0])
    assert first.against is None
    assert second.against == welch(mine[1], mine[0])
    assert "95 %" in grouping.note
    assert "values on average" not in grouping.note


@pytest.mark.parametrize(
    ("by", "names"),
    [(r"-(sgd|adamw)-", ["sgd", "adamw"]), (r"seed([01])", ["0", "1", "(no match)"])],
)
def test_runs_are_compared_by_anything_else(seeds, by, names):
    [grouping] = found(seeds, group_by=by).groups
    assert {group.name for group in grouping.groups} == set(names)


def test_runs_that_do_not_match_are_no_reference(seeds):
    [grouping] = found(seeds, group_by=r"(adamw)").groups
    matched, others = grouping.groups
    assert (matched.name, others.name) == ("adamw", "(no match)")
    assert matched.best < others.best
    assert matched.against is None
    [grouping] = found(seeds, "net-adamw-seed0", "net-adamw-seed1", "net-sgd-seed0", group_by=r"(adamw)").groups
    assert "(no match)" not in grouping.note


def test_runs_are_grouped_and_compared_by_a_setting(tmp_path):
    for run, lr in (("a", 0.1), ("b", 0.1), ("c", 1), ("d", 1.0), ("e", None)):
        config = {} if lr is None else {"opt": {"lr": lr}, "seed": run, "same": 1}
        with checkpointer(tmp_path, run=run, state={"x": 1}, keep=[pp.Best("acc", "max")], config=config) as ckpt:
            for step, acc in enumerate([0.1, 0.7 if lr == 0.1 else 0.4, ord(run) / 1000]):
                ckpt.report(acc=acc, step=step)
    [grouping] = found(tmp_path, group_by="config.opt.lr").groups
    assert [(group.name, group.runs) for group in grouping.groups] == [
        ("0.1", ("a", "b")),
        ("1", ("c", "d")),
        ("(not known)", ("e",)),
    ]
    with pytest.raises(
        pp.errors.NotFoundError, match=r"no run here has a setting config\.opt\.l; did you mean 'config"
    ):
        found(tmp_path, group_by="config.opt.l")
    with pytest.raises(pp.errors.ConfigError, match="a setting such as config"):
        found(tmp_path, group_by="optimiser")
    told = {table.title: table for table in tables(found(tmp_path, "a", "c"))}
    assert [dict(zip(told["Runs"].columns, row, strict=True))["settings"] for row in told["Runs"].rows] == [
        "opt.lr 0.1, seed a",
        "opt.lr 1, seed c",
    ], "those that differ"
    [runs] = [table for table in tables(found(tmp_path, "a")) if table.title == "Runs"]
    assert "opt.lr 0.1, seed a, same 1" in runs.rows[0]


def test_three_groups_share_the_risk(seeds):
    [grouping] = found(seeds, group_by=r"(seed\d)").groups
    others = [group.against.confidence for group in grouping.groups[1:]]
    assert others == pytest.approx([1 - 0.05 / 3] * 2)


def test_one_run_of_a_kind_is_no_evidence(seeds):
    [grouping] = found(seeds, "net-sgd-seed0", "net-adamw-seed0").groups
    assert all(group.against is None for group in grouping.groups)
    assert "several seeds" in grouping.note


def test_groups_with_more_values_are_not_taken_for_better(tmp_path):
    for run, count in (("short-1", 4), ("short-2", 4), ("long-1", 9), ("long-2", 9)):
        write(tmp_path, run, acc=noisy(count, seed=count))
    [grouping] = found(tmp_path, group_by="(short|long)").groups
    assert "4 to 9 values" in grouping.note


@pytest.mark.parametrize("by", ["(", "net", "(a)(b)", "state:model"])
def test_what_cannot_group_is_refused(seeds, by):
    with pytest.raises(pp.errors.ConfigError, match="--group-by"):
        found(seeds, group_by=by)


def test_optimizers_are_found_among_the_parts():
    assert optimizer_of({"optimizer": "adamwprune.optim.AdamWPrune", "swa": "torch.optim.swa_utils.AveragedModel"}) == (
        "AdamWPrune"
    )
    assert optimizer_of({"g": "torch.optim.adam.Adam", "d": "torch.optim.sgd.SGD"}) == "Adam + SGD"
    assert optimizer_of({"s": "torch.optim.lr_scheduler.StepLR"}) == "(not known)"


# --- sparsity -----------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(10, 20))
        self.b = torch.nn.Parameter(torch.randn(50).to(torch.bfloat16))
        self.c = torch.nn.Parameter(torch.randn(7).to(torch.float16))
        self.register_buffer("d", torch.randn(9).to(torch.float8_e4m3fn))
        self.register_buffer("e", torch.randn(5, dtype=torch.complex64))
        self.register_buffer("count", torch.zeros(11, dtype=torch.int64))
        self.register_buffer("none", torch.empty(0, 3))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    root = tmp_path_factory.mktemp("pruned")
    torch.manual_seed(1)
    net = Net()
    rules = [pp.BestAtSparsity("acc", "max", targets=(0.0, 0.5, 0.9), tolerance=0.02), pp.Last(10)]
    with checkpointer(root, run="p", state={"model": net}, keep=rules, overlap=False) as ckpt:
        for epoch, (sparsity, acc) in enumerate(
            [(0.0, 0.7), (0.0, 0.72), (0.5, 0.71), (0.51, 0.715), (0.7, 0.6), (0.9, 0.5)]
        ):
            with torch.no_grad():
                for tensor in net.state_dict().values():
                    flat = tensor.view(-1)
                    flat[: int(len(flat) * sparsity)] = 0
                net.a.view(-1)[:1] *= -1  # a negative zero is a zero
            ckpt.report(acc=acc, sparsity=sparsity, epoch=epoch, step=epoch)
    return root, net


def test_the_best_at_each_target_and_what_it_costs(pruned):
    [one] = found(pruned[0]).tradeoffs
    assert [(at.target, at.spot.value, at.spot.sparsity) for at in one.targets] == [
        (0.0, 0.72, 0.0),
        (0.5, 0.715, 0.51),
        (0.9, 0.5, 0.9),
    ]
    assert [at.cost for at in one.targets] == pytest.approx([0, 0.005, 0.22])
    assert [spot.value for spot in one.spots if spot.on_front] == [0.72, 0.715, 0.6, 0.5]


def test_only_metrics_that_a_run_watches_are_traded_off(tmp_path):
    sparsities = [0.0, 0.5]
    write(tmp_path, "p", acc=[0.5, 0.6], loss=[1.0, 0.9], sparsity=sparsities, keep=[pp.Best("acc", "max"), pp.Last(2)])
    write(tmp_path, "q", acc=[0.5, 0.6], loss=[1.0, 0.9], keep=[pp.Best("loss", "min"), pp.Last(2)])
    assert [one.metric for one in found(tmp_path).tradeoffs] == ["acc"]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12),
    st.sampled_from(["max", "min"]),
    st.booleans(),
)
def test_the_front_is_that_of_brute_force(points, mode, reverse):
    class One:
        name, rules = "r", ()

        def __init__(self, spots):
            self.checkpoints = spots

    class Spot:
        run, epoch, parts, forks = "r", None, {}, ()

        def __init__(self, at, sparsity, value):
            self.id = self.name = str(at)
            self.sequence = self.step = at
            self.metrics = {"s": float(sparsity), "v": float(value)}

    spots = [Spot(at, *point) for at, point in enumerate(points)]
    result = tradeoff([One(spots[::-1] if reverse else spots)], "v", mode, "s")
    if len({sparsity for sparsity, _ in points}) < 2:
        assert result is None
        return
    sign = 1 if mode == "max" else -1

    def beaten(one):
        return any(
            s >= one.sparsity and sign * v >= sign * one.value and (s, v) != (one.sparsity, one.value)
            for s, v in points
        )

    assert len(result.spots) == len(points)
    on_front = [spot for spot in result.spots if spot.on_front]
    assert {(spot.sparsity, spot.value) for spot in on_front} == {
        (spot.sparsity, spot.value) for spot in result.spots if not beaten(spot)
    }
    assert len(on_front) == len({(spot.sparsity, spot.value) for spot in on_front})


def test_the_recorded_sparsity_tells_how_many_parameters_are_not_zero(pruned):
    root, net = pruned
    [one] = found(root, compare=[("p:epoch=0", "p@latest")]).comparisons
    floats = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point() or tensor.is_complex()]
    assert one.compressed.parameters == sum(tensor.numel() for tensor in floats)
    assert one.original.nonzero == one.original.parameters
    assert one.compressed.nonzero == round(0.1 * one.compressed.parameters)
    assert "if the recorded sparsity" in one.compressed.source


def test_an_archived_checkpoint_shows_its_packed_size(pruned, tmp_path):
    root = shutil.copytree(pruned[0], tmp_path / "copy")
    maintenance.archive(pp.open(root).run("p"))
    [one] = found(root, compare=[("p:epoch=0", "p@latest")]).comparisons
    assert one.compressed.packed_bytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_a_masked_weight_is_counted_once(tmp_path, dtype):
    layer = torch.nn.Linear(20, 10)
    prune.random_unstructured(layer, "weight", amount=180)
    layer.weight_mask = layer.weight_mask.to(dtype)
    write(tmp_path, "r", acc=[0.5], sparsity=[0.9], state={"model": layer})
    size = found(tmp_path, compare=[("r", "r")]).comparisons[0].original
    assert (size.parameters, size.nonzero) == (210, 21)
    assert size.sparse_bytes == math.ceil(210 / 8) + 4 * 21


def test_the_estimate_of_sparse_storage_is_a_mask_and_the_values(tmp_path):
    weights = torch.zeros(1000)
    weights[:100] = 1
    write(
        tmp_path, "r", acc=[0.5], sparsity=[0.9], state={"model": {"w": weights, "n": torch.ones(4, dtype=torch.int64)}}
    )
    [one] = found(tmp_path, compare=[("r", "r")]).comparisons
    assert one.original.part_bytes == 4000 + 32
    assert one.original.sparse_bytes == 1000 // 8 + 100 * 4 + 32
    assert one.original.parameters == 1000


def test_dense_is_compared_with_each_target_by_itself(pruned):
    report = found(pruned[0], n_eval=1000)
    assert [one.compressed.metrics["sparsity"] for one in report.comparisons] == [0.51, 0.9]
    [acc] = [item for item in report.comparisons[1].differences if item.metric == "acc"]
    reach = 1.96 * math.hypot(of_proportion(0.72, 1000), of_proportion(0.5, 1000))
    assert (acc.interval.low, acc.interval.high) == pytest.approx((-0.22 - reach, -0.22 + reach), rel=1e-4)


def test_it_is_said_where_the_part_is_missing(tmp_path):
    rules = [pp.BestAtSparsity("acc", "max", targets=(0.0, 0.5)), pp.Last(2)]
    for run, name in (("p", "model"), ("q", "net")):
        write(tmp_path, run, acc=[0.7, 0.6], sparsity=[0.0, 0.5], state={name: {"w": 1.5}}, keep=rules)
    report = found(tmp_path)
    assert [one.why.partition(":")[0] for one in report.comparisons] == ["p"]
    [said] = [text for text in report.remarks if "--part" in text]
    assert said.startswith("q: compressed is not compared with original. no part 'model' in ")
    assert len(found(tmp_path, "q", part="net").comparisons) == 1
    assert not any("--part" in text for text in found(tmp_path, "q", part="net").remarks)


def test_latency_is_what_was_recorded_and_nothing_else(pruned, tmp_path):
    root = shutil.copytree(pruned[0], tmp_path / "copy")
    run = pp.open(root).run("p")
    run.record("p:epoch=1", {"latency_ms": 9.0})
    run.record("p:epoch=5", {"latency_ms": 4.0})
    last = found(root).comparisons[-1]
    assert {item.metric: (item.original, item.compressed) for item in last.differences}["latency_ms"] == (9.0, 4.0)
    assert all("latency_ms" not in {item.metric for item in one.differences} for one in found(pruned[0]).comparisons)


# --- what is not there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runs": ["rr"]}, "no run 'rr'; did you mean 'r'"),
        ({"metrics": {"ac": "max"}}, "did you mean 'acc'"),
        ({"n_eval": {"ac": 5}}, "did you mean 'acc'"),
        ({"compare": [("r", "q")]}, "no run 'q'"),
        ({"compare": [("r", "r:epoch=9")]}, "no checkpoint of epoch 9"),
        ({"compare": [("r", "r")], "part": "modle"}, "parts: x"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(tmp_path, options, words):
    write(tmp_path, "r", acc=[0.5, 0.7])
    with pytest.raises(pp.Error, match=words) as caught:
        evaluate(pp.open(tmp_path), **options)
    assert isinstance(caught.value, pp.errors.ConfigError | LookupError)


def test_directions_must_be_said(tmp_path):
    write(tmp_path, "r", acc=[0.5, 0.7], keep=[pp.Last(2)])
    report = found(tmp_path)
    assert report.peaks == ()
    assert any("--metric NAME:max, of acc" in remark for remark in report.remarks)
    with pytest.raises(pp.errors.ConfigError, match="mode must be"):
        found(tmp_path, metrics={"acc": "up"})
    with pytest.raises(pp.errors.ConfigError, match="no rule says"):
        found(tmp_path, compare=[("r", "r")])


@pytest.mark.parametrize("options", [{"runs": "r"}, {"metrics": ["acc"]}, {"metrics": "acc"}])
def test_what_is_no_list_or_dict_is_refused(tmp_path, options):
    write(tmp_path, "r", acc=[0.5])
    with pytest.raises(pp.errors.ConfigError, match="runs is a list"):
        evaluate(pp.open(tmp_path), **options)


def test_runs_with_little_in_them_are_no_errors(tmp_path):
    write(tmp_path, "empty")
    write(tmp_path, "nan", acc=[math.nan], keep=[pp.Best("acc", "max"), pp.Last(1)])
    write(tmp_path, "none", x=[None, None], keep=[pp.Last(1)])
    report = found(tmp_path)
    assert report.peaks == report.groups == report.tradeoffs == report.comparisons == ()
    text = " ".join(report.remarks)
    assert "empty has no reports yet" in text
    assert "nan has no finite value of acc" in text
    assert "none: none of its reports has a metric" in text


def test_values_that_are_not_finite_are_counted(tmp_path):
    write(tmp_path, "r", acc=[0.5, math.nan, 0.7, math.inf, 0.6])
    report = found(tmp_path)
    assert (report.peaks[0].peak.count, report.peaks[0].peak.missing) == (3, 2)
    assert any("2 values of acc are NaN or infinite" in remark for remark in report.remarks)


def test_a_training_that_was_stopped_early_says_so(tmp_path):
    for run, patience in (("stopped", 3), ("whole", 50)):
        stop = pp.EarlyStopping("acc", "max", patience=patience)
        with QuietCheckpointer(tmp_path, run=run, state={"x": 1}, keep=[pp.Best("acc", "max")], stop=stop) as ckpt:
            for epoch in ckpt.epochs(12):
                ckpt.report(acc=1 - abs(5 - epoch) / 10)
    found = evaluation.evaluate(pp.open(tmp_path))
    ended = {one.name: (one.stopped_early, one.ended, len(one.history)) for one in found.runs}
    assert ended["whole"] == (False, "closed", 12)
    assert ended["stopped"][0] is True
    assert ended["stopped"][1].startswith("stopped early: acc has not improved")
    assert ended["stopped"][2] == 9
    evaluation.write(found, tmp_path / "curves.svg")
    assert "stopped early" in (tmp_path / "curves.svg").read_text()
