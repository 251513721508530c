"""What differs between checkpoints: from manifests, and value by value beside brute force."""

import json
import math
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import peakpoint as pp
from peakpoint.cli.main import cli
from peakpoint.errors import ConfigError, CorruptError, NotFoundError
from peakpoint.models.value_diff import distance
from peakpoint.reports.diff import CheckpointDifference, diff_records
from peakpoint.repository import maintenance
from training import checkpointer, parts, train

KINDS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": "<i8",
    "I32": "<i4",
    "I8": "<i1",
    "U8": "<u1",
    "U16": "<u2",
    "BOOL": "?",
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_distances_are_those_of_brute_force(kind, data):
    count = data.draw(st.integers(0, 20))
    width = np.dtype(KINDS[kind]).itemsize
    raw = arrays.arrays(np.uint8, count * width, elements=st.integers(0, 1) if kind == "BOOL" else None)
    bits = [data.draw(raw).tobytes(), data.draw(raw).tobytes()]
    found = distance(bits[0], kind, bits[1], kind)
    with np.errstate(all="ignore"):
        a, b = (np.frombuffer(one, KINDS[kind]).astype(np.float64) for one in bits)
        good = np.isfinite(a) & np.isfinite(b)
        x, y = a[good].astype(np.longdouble), b[good].astype(np.longdouble)
        wide = [np.sqrt((one**2).sum()) for one in (x, y)]  # as floats, the smallest would be rounded to a half
        norms = list(map(float, wide))
        apart = float(np.sqrt(((y - x) ** 2).sum()))
        dot = float((x * y).sum() / (wide[0] * wide[1])) if all(norms) and np.isfinite(norms).all() else None
    assert found.norm == pytest.approx(norms[0], rel=1e-9, abs=0)
    if kind != "F64":  # whose differences can be too large for double precision
        assert found.l2 == pytest.approx(apart, rel=1e-9, abs=0)
        assert found.largest == pytest.approx(float(np.abs(y - x).max()) if len(x) else 0, rel=1e-12, abs=0)
        assert found.relative == pytest.approx(apart / norms[0] if norms[0] else math.inf if apart else 0.0, rel=1e-9)
    assert (found.cosine is None) == (dot is None)
    if dot is not None:
        assert found.cosine == pytest.approx(dot, abs=1e-7)
    rows = [np.frombuffer(one, np.uint8).reshape(count, width) for one in bits]
    assert found.changed == (rows[0] != rows[1]).any(axis=1).sum()
    assert found.zeros == ((a == 0).mean() if count else 0, (b == 0).mean() if count else 0)
    assert found.not_finite == ((~np.isfinite(a)).sum(), (~np.isfinite(b)).sum())


def test_the_smallest_numbers_have_an_angle_too():
    a, b = (np.array(values) * 5e-324 for values in ([1.0, 1.0], [1.0, 2.0]))
    assert distance(a.tobytes(), "F64", b.tobytes(), "F64").cosine == pytest.approx(3 / math.sqrt(10))


def test_pieces_of_large_tensors_add_up():
    torch.manual_seed(0)
    a, b = torch.randn(2_500_000), torch.randn(2_500_000)
    b[7] = math.nan
    found = distance(a.numpy().tobytes(), "F32", b.numpy().tobytes(), "F32")
    a, b = a.double(), b.double()
    a[7] = b[7] = 0
    assert found.l2 == pytest.approx((a - b).norm().item(), rel=1e-12)
    assert found.relative == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-12)
    assert found.cosine == pytest.approx(torch.nn.functional.cosine_similarity(a, b, dim=0).item(), rel=1e-9)
    assert found.not_finite == (0, 1)


def test_element_types_may_differ_and_numbers_may_be_complex():
    a = torch.tensor([1.0, 2.0, 3.0])
    half = a.bfloat16().view(torch.uint8).numpy().tobytes()
    found = distance(a.numpy().tobytes(), "F32", half, "BF16")
    assert (found.l2, found.changed) == (0, None)
    left, right = torch.tensor([3 + 4j, 0j]), torch.tensor([3 + 4j, 0 + 2j])
    found = distance(left.numpy().tobytes(), "C64", right.numpy().tobytes(), "C64")
    assert (found.norm, found.l2, found.changed, found.zeros) == (5, 2, 1, (0.5, 0))
    assert distance(left.numpy().tobytes(), "C64", a[:2].numpy().tobytes(), "F32").norm == 5


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two runs of one model, the second wider, with another metric and a part of its own."""
    root = tmp_path_factory.mktemp("diff")
    for run, width in (("a", 4), ("b", 6)):
        model, optimizer = parts(width=width)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        frozen = torch.arange(100.0)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "frozen": {"weight": frozen}}
        if run == "b":
            state["extra"] = {"ema": torch.zeros(3)}
        keep = [pp.Best("acc", "max"), pp.Best("loss", "min"), pp.Last(9)]
        with checkpointer(root, run=run, state=state, keep=keep) as ckpt:
            for epoch in ckpt.epochs(3):
                loss = train(model, optimizer)
                scheduler.step()
                ckpt.report(acc=0.5 + epoch / 10, loss=loss, **({"other": 1} if run == "b" else {}))
    return root


def test_two_checkpoints_of_one_run(root):
    found = pp.diff("a:epoch=0", "a:epoch=2", root=root)
    assert isinstance(found, CheckpointDifference)
    acc, loss = found.metrics
    assert (acc.name, acc.mode, acc.better) == ("acc", "max", "b")
    assert acc.change == pytest.approx(0.2)
    assert loss.better == ("b" if loss.b < loss.a else "a")
    assert (found.a.step, found.b.step) == (1, 3)
    assert found.a.classes["optimizer"] == "torch.optim.sgd.SGD"
    assert found.a.rules == ("best:acc:max", "best:loss:min", "last:9")
    assert (found.same_tensors, found.same_bytes) == (1, 400)
    states = [pp.load(ref, root=root) for ref in ("a:epoch=0", "a:epoch=2")]
    weights = {one.name: one for one in found.tensors if one.part == "model"}
    assert weights.keys() == states[0]["model"].keys()
    for name, one in weights.items():
        left, right = (state["model"][name].double() for state in states)
        assert one.distance.l2 == pytest.approx((right - left).norm().item())
        assert one.distance.largest == (right - left).abs().max().item()
    order = [one.distance.relative for one in found.tensors]
    assert order == sorted(order, reverse=True)
    plain = {one.path: (one.a, one.b) for one in found.plain}
    assert plain["optimizer.param_groups.0.lr"] == ("0.025", "0.00625")
    assert plain["scheduler.last_epoch"] == ("1", "3")
    assert found.generators_same is False
    assert not found.identical


def test_a_checkpoint_and_itself(root):
    found = pp.diff("a@latest", "a:epoch=2", root=root)
    assert found.identical
    assert (found.tensors, found.plain, found.generators_same, found.changed_bytes) == ((), (), True, 0)
    assert all(one.better is None for one in found.metrics)


def test_checkpoints_of_two_runs(root):
    found = pp.diff("a@latest", "b@latest", root=root)
    assert (found.parts_only_in_a, found.parts_only_in_b) == ((), ("extra",))
    kinds = {(one.part, one.name): one for one in found.tensors}
    wider = kinds["model", "0.weight"]
    assert (wider.what, wider.a, wider.b, wider.distance) == ("shape", ("F32", (4, 3)), ("F32", (6, 3)), None)
    assert kinds["model", "2.bias"].distance is not None
    assert kinds["extra", "ema"].what == "only in b"
    other = next(one for one in found.metrics if one.name == "other")
    assert (other.a, other.b, other.change, other.better) == (None, 1, None, None)


def test_classes_rules_and_code_are_those_of_the_process_that_saved(tmp_path):
    with checkpointer(tmp_path, state={"x": torch.nn.Linear(2, 1)}, keep=[pp.Last(5)]) as ckpt:
        ckpt.report(step=1)
    with checkpointer(tmp_path, state={"x": torch.nn.Bilinear(1, 2, 1)}, keep=[pp.Last(6)], resume="never") as ckpt:
        ckpt.report(step=2)
    found = diff_records(pp.open(tmp_path), "r:1", "r:2")
    assert [side.rules for side in (found.a, found.b)] == [("last:5",), ("last:6",)]
    assert [side.classes["x"].rpartition(".")[2] for side in (found.a, found.b)] == ["Linear", "Bilinear"]


def test_what_was_measured_later_counts(root):
    run = pp.open(root).run("b")
    run.record("b:epoch=1", {"test": 0.9})
    found = diff_records(pp.open(root), "b:epoch=0", "b:epoch=1")
    assert next(one for one in found.metrics if one.name == "test").b == 0.9


def test_tensors_that_are_the_same_are_not_read(root, tmp_path):
    ref = pp.open(root).find("a:epoch=0")
    manifest = pp.open(root).find_manifest(ref.ref)
    file = manifest.file("frozen.safetensors")
    path = ref.path / file.name
    before = path.read_bytes()
    try:
        path.unlink()  # a name of its own, if it is shared
        path.write_bytes(before[: file.header] + b"\xff" * (len(before) - file.header))
        assert pp.diff(ref.ref, "a:epoch=2", root=root).same_tensors == 1
    finally:
        path.write_bytes(before)
    path = ref.path / "model.safetensors"
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(CorruptError, match=r"tensor .* in model.safetensors"):
            pp.diff(ref.ref, "a:epoch=2", root=root)
        assert diff_records(pp.open(root), ref.ref, "a:epoch=2").tensors  # manifests know all the same
    finally:
        path.write_bytes(before)


def test_archived_checkpoints_are_compared_too(root, tmp_path):
    with checkpointer(tmp_path, state={"model": (model := torch.nn.Linear(9, 9))}, keep=[pp.Last(3)]) as ckpt:
        for step in (1, 2):
            with torch.no_grad():
                model.weight.add_(step)
            ckpt.report(step=step)
    before = pp.diff("r:1", "r:2", root=tmp_path)
    maintenance.archive(pp.open(tmp_path).run("r"))
    assert pp.diff("r:1", "r:2", root=tmp_path) == before


# --- the command --------------------------------------------------------------------------------------------------


def invoke(*words):
    return CliRunner().invoke(cli, ["diff", *map(str, words)], catch_exceptions=False)


def test_the_command_tells_what_differs(root):
    text = invoke(root, "a:epoch=0", "a:epoch=2").output
    assert "optimizer.param_groups.0.lr" in text
    assert "random generators: in different states" in text
    assert "1 tensor the same, 400 B" in text
    assert "0.7 *  (+0.2)" in text
    short = invoke(root, "a:epoch=0", "a:epoch=2", "--top", 1).output
    assert "--all lists them" in short
    assert "--all" not in invoke(root, "a:epoch=0", "a:epoch=2", "--all").output
    two = invoke(root, "a@latest", "b@latest").output
    assert "part extra is only in b" in two
    assert "F32[4, 3] and F32[6, 3]" in two


def test_what_matters_comes_first_and_what_always_differs_last(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for run, config in (("a", {"lr": 0.1, "seed": 0}), ("b", {"lr": 0.2, "seed": 0})):
        state = {"optimizer": optimizer, "scheduler": scheduler, "model": model}
        with checkpointer(tmp_path, run=run, state=state, keep=[pp.Last(9)], config=config) as ckpt:
            for epoch in ckpt.epochs(2):
                train(model, optimizer, torch.randn(8, 2))
                scheduler.step()
                ckpt.report(constant=1.0, acc=epoch / 10)
    text = invoke(tmp_path, "a:epoch=0", "b:epoch=1").output
    order = ["acc ", "config.lr ", "optimizer.param_groups.0.lr", "tensors the same", "model: 0.weight"]
    order += ["optimizer: state.0.exp_avg", "optimizer: state.0.step", "saved because", "scheduler.last_epoch 1 and 4"]
    order += ["random generators", "the same in both: constant"]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order), text
    assert "config.seed" not in text
    same = invoke(tmp_path, "a:epoch=0", "a:epoch=0").output
    assert re.search(r"metrics and settings +the same +the same", same)
    told = json.loads(invoke(tmp_path, "a:epoch=0", "b:epoch=1", "--json").output)
    assert told["tensors"][0]["part"] == "model"


def test_the_command_tells_programs(root):
    told = json.loads(invoke(root, "a:epoch=0", "a:epoch=2", "--json", "--all").output)
    assert told["different_tensors"] == len(told["tensors"]) == 8
    assert told["metrics"][0]["better"] == "b"
    assert told["tensors"][0]["distance"]["relative"]
    told = json.loads(invoke(root, "a:epoch=0", "a:epoch=2", "--json", "--no-values").output)
    assert told["tensors"][0]["distance"] is None
    assert told["plain"] is None


def test_refs_that_lead_nowhere(root):
    with pytest.raises(NotFoundError, match="no checkpoint of epoch 77"):
        invoke(root, "a:epoch=0", "a:epoch=77")
    with pytest.raises(ConfigError, match="names a run but no checkpoint"):
        invoke(root, "a", "a@latest")


def test_without_values_no_torch_is_needed(root):
    code = (
        "import sys; from peakpoint.cli.main import cli; "
        f"cli.main(['diff', {str(root)!r}, 'a:epoch=0', 'b:epoch=1', '--no-values'], standalone_mode=False); "
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
