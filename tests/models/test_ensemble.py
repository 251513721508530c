"""Ensembles beside the means of their members' predictions, and what cannot be one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.errors import ConfigError, CorruptError, MismatchError, NotFoundError
from peakpoint.models.ensemble import Ensemble
from training import checkpointer


def build():
    return torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("ensembles")
    torch.manual_seed(0)
    models = [build() for _ in range(3)]
    for number, model in enumerate(models):
        model(torch.randn(16, 3) + number)  # statistics of its own
        with checkpointer(root, state={"model": model, "ema": model[0]}, resume="never") as ckpt:
            ckpt.report(step=number + 1)
    return root, ["r:1", "r:2", "r:3"], [model.eval() for model in models]


INPUTS = torch.linspace(-2, 2, 30).reshape(10, 3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_predictions_are_the_means_of_those_of_the_members(trained, count):
    root, refs, models = trained
    with torch.no_grad():
        outputs = torch.stack([model(INPUTS) for model in models[:count]]).double()
        together = pp.ensemble(refs[:count], build, root=root)
        found = together(INPUTS)
        assert torch.allclose(found.exp().double(), outputs.softmax(-1).mean(0), atol=1e-6)
        assert torch.allclose(found.exp().sum(-1), torch.ones(10), atol=1e-6)
        logits = pp.ensemble(refs[:count], build, root=root, average="logits")
        assert torch.allclose(logits(INPUTS).double(), outputs.mean(0), atol=1e-6)
    assert isinstance(together, Ensemble)
    assert not any(module.training for member in together.members for module in member.modules())
    assert together.size_bytes == count * sum(one.nbytes for one in build().state_dict().values())
    assert "r/step1" in repr(together)


def test_it_takes_the_place_of_a_model(trained):
    """Cross-entropy of what it returns is the negative logarithm of the mean probability."""
    root, refs, models = trained
    targets = torch.arange(10) % 4
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(pp.ensemble(refs, build, root=root)(INPUTS), targets)
        mean = torch.stack([model(INPUTS).double().softmax(-1) for model in models]).mean(0)
    assert loss.item() == pytest.approx(-mean[range(10), targets].log().mean().item(), rel=1e-5)


@given(
    logits=st.lists(st.lists(st.floats(-300, 300, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=100, deadline=None)
def test_probabilities_too_small_for_their_type_keep_their_logarithm(logits, dtype):
    class Fixed(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.register_buffer("values", torch.tensor([values], dtype=dtype))

        def forward(self):
            return self.values

    members = [Fixed(values) for values in logits]
    found = Ensemble(members, [str(number) for number in range(len(members))])()
    assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    wide = torch.stack([member.values.double().log_softmax(-1) for member in members])
    expected = wide.logsumexp(0) - torch.tensor(float(len(members)), dtype=torch.float64).log()
    assert torch.isfinite(found).all()
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_classes_may_be_in_another_dimension(tmp_path):
    models = [torch.nn.Conv2d(1, 3, 1) for _ in range(2)]
    for number, model in enumerate(models):
        with checkpointer(tmp_path, state={"model": model}, resume="never") as ckpt:
            ckpt.report(step=number + 1)
    images = torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        found = pp.ensemble(["r:1", "r:2"], lambda: torch.nn.Conv2d(1, 3, 1), root=tmp_path, dim=1)(images)
        expected = sum(model(images).softmax(1) for model in models) / 2
    assert torch.allclose(found.exp(), expected, atol=1e-6)


def test_other_parts_can_predict(trained):
    root, refs, models = trained
    found = pp.ensemble(refs[:1], lambda: torch.nn.Linear(3, 8), root=root, part="ema", average="logits")
    assert torch.equal(found(INPUTS), models[0][0](INPUTS))


@pytest.mark.parametrize(
    ("refs", "make", "options", "error", "says"),
    [
        ([], build, {}, ConfigError, "0 refs"),
        ("r:1", build, {}, ConfigError, "a list of refs"),
        (["r:1", "r:9"], build, {}, NotFoundError, "step 9"),
        (["nothing@latest"], build, {}, NotFoundError, "nothing"),
        (["r:1", "r/step1"], build, {}, ConfigError, "same checkpoint"),
        (["r:1"], build, {"part": "emo"}, NotFoundError, "did you mean 'ema'"),
        (["r:1"], build, {"average": "votes"}, ConfigError, "'probabilities' or 'logits'"),
        (["r:1"], 3, {}, ConfigError, "takes a function"),
        (["r:1"], dict, {}, ConfigError, "returned a dict"),
        (["r:1"], build, {"device": "abacus"}, ConfigError, "cannot put the model there"),
        (["r:1"], lambda: torch.nn.Linear(3, 8), {}, MismatchError, "weight"),
    ],
)
def test_what_cannot_be_is_refused(trained, refs, make, options, error, says):
    with pytest.raises(error) as raised:
        pp.ensemble(refs, make, root=trained[0], **options)
    assert says in str(raised.value)


def test_models_that_share_memory_are_refused(trained):
    root, refs, _ = trained
    model = build()
    with pytest.raises(ConfigError, match="it must make a new one"):
        pp.ensemble(refs, lambda: model, root=root)
    head = torch.nn.Linear(8, 4)
    with pytest.raises(ConfigError, match="it must make a new one"):
        pp.ensemble(refs, lambda: torch.nn.Sequential(*build()[:3], head), root=root)


def test_outputs_that_have_no_mean_are_refused():
    with pytest.raises(MismatchError, match=r"two returns \[2, 1\], and one returns \[2, 3\]"):
        Ensemble([torch.nn.Identity(), torch.nn.AvgPool1d(3)], ["one", "two"])(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="one returns a tuple"):
        Ensemble([torch.nn.LSTM(3, 2)], ["one"])(torch.zeros(2, 3))


def test_a_damaged_member_is_named(tmp_path):
    with checkpointer(tmp_path, state={"model": build()}) as ckpt:
        ckpt.report(step=1)
    file = pp.open(tmp_path).run("r").latest().path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        pp.ensemble(["r:1"], build, root=tmp_path)
